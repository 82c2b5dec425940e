"""train.py and eval.py as several real processes of one run: the losses of one process, and one end for all of them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import ROOT, small_overrides

from attnres_jax.config import load_config
from attnres_jax.parallel.processes import ProcessError, group_of
from attnres_jax.training import train
from attnres_jax.training.records import read_rows, read_summary

STEPS, TIMEOUT = 12, 6
CHANGES = {
    "optimizer.warmup_steps": 2,
    "training.steps": STEPS,
    "training.eval_every": 6,
    "training.process_timeout": TIMEOUT,
}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return small_overrides(tmp_path_factory, CHANGES)


@pytest.fixture(scope="module")
def one_process(overrides, tmp_path_factory):
    """The rows of the run in one process."""
    workdir = tmp_path_factory.mktemp("one")
    train(load_config(str(ROOT / "configs/tiny.py"), overrides), workdir)
    return losses(workdir)


def losses(workdir: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_rows(workdir / "metrics.jsonl")]


def assert_same_losses(got, want):
    assert [row[:2] for row in got] == [row[:2] for row in want]  # each step once, by one process
    np.testing.assert_allclose([row[2] for row in got], [row[2] for row in want], rtol=1e-5)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Processes:
    """A script in so many processes on this machine."""

    def __init__(self, count: int, *arguments: str, devices: int = 1, cluster: bool = False, script: str = "train.py"):
        port = free_port()
        base = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }
        self.processes = []
        for index in range(count):
            group = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
            environment = base
            if cluster:
                group, environment = ["--distributed"], base | slurm(count, index, port)
            command = [sys.executable, str(ROOT / script), *arguments, *(group if count > 1 else [])]
            pipe = subprocess.PIPE
            self.processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))

    def send(self, index: int, number: int, when: Callable[[], bool]) -> float:
        """Sends process `index` a signal as soon as `when()` holds; when that was."""
        while not when():
            assert self.processes[index].poll() is None, self.processes[index].communicate()[1][-3000:]
            time.sleep(0.002)
        self.processes[index].send_signal(number)
        return time.monotonic()

    def finish(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each."""
        try:
            ends = [(*process.communicate(timeout=120), process.returncode) for process in self.processes]
        finally:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        return [(code, out, err) for out, err, code in ends]


def slurm(count: int, index: int, port: int) -> dict[str, str]:
    """What Slurm tells a process of a step with one node. JAX makes the port of the job's number."""
    job = str(port % 4096)
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def training(workdir: Path, overrides: list[str], *more: str) -> list[str]:
    settings = [f"--config.{override}" for override in (*overrides, *more)]
    return [f"--config={ROOT / 'configs/tiny.py'}", f"--workdir={workdir}", *settings]


def logged(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether a process about to start has logged `step`."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0

    def is_logged() -> bool:
        written = path.exists() and path.stat().st_mtime_ns != before
        return written and any(row["step"] >= step for row in read_rows(path))

    return is_logged


def saved(workdir: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def test_two_then_one_then_four_processes_train_as_one(overrides, one_process, tmp_path):
    """Killed, told to stop, finished: on other numbers of processes, the losses of one that nothing happened to."""
    workdir, arguments = tmp_path / "run", training(tmp_path / "run", overrides)
    two = Processes(2, *arguments, devices=2)
    killed = two.send(1, signal.SIGKILL, lambda: saved(workdir))
    (code, _, err), _ = two.finish()
    assert code == 1 and time.monotonic() - killed < TIMEOUT + 5
    assert_last_words(err, "process 0 of 2")

    when = logged(workdir, 6)
    one = Processes(1, *arguments)
    one.send(0, signal.SIGTERM, when)
    [(code, out, err)] = one.finish()
    assert code == 0 and "resuming" in out, err
    assert read_summary(workdir)["status"] == "interrupted" and read_summary(workdir)["steps"] < STEPS

    ends = Processes(4, *arguments).finish()
    assert [code for code, _, _ in ends] == [0] * 4, ends
    assert read_summary(workdir)["status"] == "finished" and (workdir / "inspection.npz").exists()
    assert_same_losses(losses(workdir), one_process)
    assert ["step" in out + err for _, out, err in ends] == [True, False, False, False]

    final = read_summary(workdir)["final_loss"]
    ends = Processes(2, f"--workdir={workdir}", script="eval.py").finish()
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert f"step {STEPS}: held-out loss {final:.4f}" in ends[0][1] and "held-out" not in ends[1][1]


def assert_last_words(err: str, who: str):
    line = err.splitlines()[-1]
    assert f"{who} ends because another one died" in line and "resumes from the newest checkpoint" in line, err


def test_a_dead_first_process_ends_the_others_and_a_signal_to_one_stops_all(overrides, one_process, tmp_path):
    workdir, arguments = tmp_path / "run", training(tmp_path / "run", overrides)
    when = logged(workdir, 5)
    two = Processes(2, *arguments, cluster=True)
    killed = two.send(0, signal.SIGKILL, when)
    _, (code, _, err) = two.finish()
    assert code == 1 and time.monotonic() - killed < TIMEOUT + 5
    assert_last_words(err, "process 1 of 2")

    when = logged(workdir, 5)
    two = Processes(2, *arguments)
    two.send(1, signal.SIGTERM, when)
    ends = two.finish()
    assert [code for code, _, _ in ends] == [0, 0], ends
    stopped = read_summary(workdir)
    assert stopped["status"] == "interrupted" and 5 < stopped["steps"] < STEPS
    assert f"interrupted after step {stopped['steps']}" in ends[0][1] and not ends[1][1].count("interrupted")
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == stopped["steps"]
    got = losses(workdir)
    assert_same_losses(got, one_process[: len(got)])

    ends = Processes(2, *training(workdir, overrides, "seed=7")).finish()
    lines = [err.splitlines()[-1] for _, _, err in ends]
    assert [code for code, _, _ in ends] == [2, 2] and lines[0] == lines[1], ends
    assert "seed=0 there, 7 asked" in lines[0]


LOSING = """
import os, sys
from attnres_jax.parallel.processes import DeadProcessError, Group, joined
try:
    with joined(Group({coordinator!r}, 1, 0), 5):
{failure}
except DeadProcessError as error:
    print(error, file=sys.stderr)
    os.write(2, b"what one of JAX's threads logs meanwhile")
"""
GLOO = "raise RuntimeError('Gloo all-reduce failed: Read error')"
BARRIER = "raise RuntimeError('Barrier failed. RPC: /xla.coordination.CoordinationService/Barrier')"
CLOSING = f"""
try:
    {GLOO}
finally:
    raise OSError("nothing to close")
"""


@pytest.mark.parametrize("failure", [GLOO, BARRIER, CLOSING])
def test_a_failed_collective_or_save_ends_with_the_last_words(failure):
    script = LOSING.format(coordinator=f"localhost:{free_port()}", failure=textwrap.indent(failure, 8 * " "))
    command = [sys.executable, "-c", script]
    end = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert end.returncode == 1
    assert_last_words(end.stderr, "process 0 of 1")


ABORTED = """
import gc, os
from attnres_jax.errors import UserError
from attnres_jax.parallel.processes import Group, joined

def run():
    with joined(Group({coordinator!r}, 1, 0), 5):
        raise UserError("something to mend")

try:
    run()
except UserError:
    gc.collect()
os.abort()  # as the coordination service does while the process ends
"""


def test_an_abort_after_an_error_to_mend_ends_with_the_last_words_too():
    script = ABORTED.format(coordinator=f"localhost:{free_port()}")
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert end.returncode == 1, end
    assert_last_words(end.stderr, "process 0 of 1")


def test_a_loss_that_is_not_finite_ends_all(overrides, tmp_path):
    ends = Processes(2, *training(tmp_path / "run", overrides, "optimizer.learning_rate=1e30")).finish()
    assert [code for code, _, _ in ends] == [1, 1], ends
    for _, _, err in ends:
        assert re.search(r"step \d+ is not finite", err.splitlines()[-1])


def test_a_process_that_meets_nobody_says_so(overrides, tmp_path):
    arguments = training(tmp_path / "run", overrides, "training.process_timeout=1")
    lonely = ["--coordinator=localhost:1", "--num_processes=2", "--process_id=1"]
    [(code, out, err)] = Processes(1, *arguments, *lonely).finish()
    assert code == 2 and err.count("\n") == 1 and not out
    assert "process 1 of 2 did not meet the others at --coordinator=localhost:1 within 1 s" in err


@pytest.mark.parametrize(
    "given, message",
    [
        (
            ("a:1", None, None),
            "--coordinator=a:1 alone names no group of processes: add --num_processes and --process_id",
        ),
        ((None, 2, 0), "add --coordinator"),
        (("a:1", 2, 2), "--process_id=2 is not one of 0 to 1"),
        (("a:1", 2, -1), "--process_id=-1 is not one of 0 to 1"),
        (("a:1", 0, 0), "--num_processes=0 must be 1 or more"),
        (("a", 2, 0), "--coordinator=a is no host:port"),
        ((None, 2, None, True), "--distributed finds the processes by itself: leave out --num_processes=2"),
    ],
)
def test_flags_that_make_no_group(given, message):
    with pytest.raises(ProcessError) as error:
        group_of(*given)
    assert message in str(error.value) and error.value.exit_code == 2


def test_no_flags_are_one_process():
    assert group_of(None, None, None) is None
