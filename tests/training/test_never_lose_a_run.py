"""train.py as real processes: killed at random, killed inside a save, told to stop; each goes on as if nothing was."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from small_runs import ROOT
from training_runs import SETTINGS, command, environment, history

from attnres_jax.training.records import read_summary

STEPS = SETTINGS["training.steps"]


class Run:
    """`train.py` in a directory, as often as need be."""

    def __init__(self, workdir: Path, overrides: list[str]):
        self.workdir = workdir
        settings = [f"--config.{override}" for override in overrides]
        self.command = command("train.py", f"--config={ROOT / 'configs/tiny.py'}", f"--workdir={workdir}", *settings)

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> tuple[int, str, str]:
        process = self.start()
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def stop(self, number: int, when: Callable[[], bool]) -> tuple[int, str, str]:
        """Sends a signal as soon as `when()` holds while training."""
        process = self.start()
        while not when():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.0005)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def logged(self, step: int) -> Callable[[], bool]:
        """Whether the process about to start has logged `step`; rows left by an earlier one do not count."""
        path = self.workdir / "metrics.jsonl"
        old = path.stat().st_ino if path.exists() else None

        def reached() -> bool:
            rewritten = path.exists() and path.stat().st_ino != old
            return rewritten and any(row["step"] >= step for row in history(self.workdir))

        return reached

    def saving(self) -> Callable[[], bool]:
        """Whether the process about to start has a save under way; what an earlier one left does not count."""
        now = time.time_ns()

        def under_way() -> bool:
            return any(mtime(path) > now for path in self.unfinished())

        return under_way

    def unfinished(self) -> list[Path]:
        """Saves that were begun and not completed."""
        return list((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def newest(self) -> int:
        return max(
            (int(path.name) for path in (self.workdir / "checkpoints").iterdir() if path.name.isdigit()), default=0
        )


def mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # Renamed meanwhile: that save is complete.
        return 0


def test_killed_at_five_random_points_one_of_them_inside_a_save(finished_run, overrides, tmp_path):
    run = Run(tmp_path / "killed", overrides)
    draw = random.Random(20)
    points = sorted(draw.sample(range(2, STEPS - 4), 4))
    for point in points[:2]:
        code, _, _ = run.stop(signal.SIGKILL, run.logged(point))
        assert code == -signal.SIGKILL
    while True:  # Until a kill falls before the rename that completes the save: nearly always the first.
        before = run.newest()
        code, _, _ = run.stop(signal.SIGKILL, inside_save := run.saving())
        assert code == -signal.SIGKILL
        if inside_save():
            break
        assert run.newest() > before
    for point in points[2:]:
        code, _, _ = run.stop(signal.SIGKILL, run.logged(max(point, run.newest() + 1)))
        assert code == -signal.SIGKILL
    code, _, err = run.finish()
    assert code == 0, err
    assert history(run.workdir) == history(finished_run)
    assert read_summary(run.workdir)["status"] == "finished"
    assert not run.unfinished()


def test_sigterm_and_ctrl_c_save_and_say_how_to_go_on(finished_run, overrides, tmp_path):
    run = Run(tmp_path / "stopped", overrides)
    for number, point in ((signal.SIGTERM, 6), (signal.SIGINT, 21)):
        code, out, err = run.stop(number, run.logged(point))
        assert code == 0, err
        summary = read_summary(run.workdir)
        assert summary["status"] == "interrupted"
        assert point <= summary["steps"] == run.newest() < STEPS
        assert "resume with: python" in out
        assert f"{signal.Signals(number).name}: finishing this step, then saving and stopping; once more" in err
        assert "Traceback" not in err
    code, _, err = run.finish()
    assert code == 0, err
    assert history(run.workdir) == history(finished_run)
    code, out, _ = run.finish()
    assert code == 0
    assert "is finished" in out


def test_exit_code_and_line_of_a_run_that_is_not_finite(poisoned_run, overrides):
    code, _, err = Run(poisoned_run, overrides).finish()
    assert code == 1
    assert "step 16 is not finite" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_exit_code_and_line_of_another_config(stopped_run, overrides):
    code, _, err = Run(stopped_run, [*overrides, "seed=1"]).finish()
    assert code == 2
    (line,) = err.splitlines()
    assert "seed=3 there, 1 asked" in line


def test_eval_prints_the_loss_of_a_checkpoint(finished_run, stopped_run):
    def evaluate(workdir, *flags):
        done = subprocess.run(
            command("eval.py", f"--workdir={workdir}", *flags), env=environment(), capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = evaluate(finished_run)
    assert code == 0, err
    assert f"step {STEPS}: held-out loss {read_summary(finished_run)['final_loss']:.4f}, perplexity" in out
    assert "bits per byte" in out
    code, out, err = evaluate(finished_run, "--step=8")
    assert "step 8: held-out loss" in out, err
    for checkpoint in (stopped_run / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(checkpoint.name + ".orbax-checkpoint-tmp"))
    code, _, err = evaluate(stopped_run)
    assert code == 2
    assert "no complete checkpoint yet" in err.splitlines()[-1]
