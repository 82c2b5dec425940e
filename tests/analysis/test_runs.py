import json

import numpy as np
import pytest

from attnres_jax.analysis import RunError, read_run
from attnres_jax.errors import ConfigError


def test_reads_what_training_wrote(real_run):
    run = read_run(real_run)
    assert run.notes == ()
    assert list(run.heldout["step"]) == [4, 8] and list(run.train["step"]) == list(range(1, 9))
    for key in (
        "final_loss",
        "best_loss",
        "final_bits_per_byte",
        "best_bits_per_byte",
        "tokens_per_second",
        "step_seconds",
    ):
        assert getattr(run, key) == pytest.approx(run.summary[key]), key
    for key in ("compile_seconds", "peak_memory_bytes", "parameters", "tokens"):
        assert getattr(run, key) == run.summary[key], key


def test_last_line_torn_by_a_kill_is_ignored(make_run):
    workdir = make_run("a")
    whole = read_run(workdir)
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "eval", "step": 41, "loss": 1.0, "note": "é'.encode()[:-1])
    run = read_run(workdir)
    assert run.final_loss == whole.final_loss and run.notes == ()


def test_broken_line_elsewhere_is_skipped_and_named(make_run):
    workdir = make_run("a")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:15]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(workdir)
    assert 3 not in run.train["step"] and len(run.train["step"]) == 39
    assert len(run.notes) == 1 and "metrics.jsonl: line 3 " in run.notes[0]


def test_one_row_is_a_run(make_run):
    workdir = make_run("a")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text(lines[-1])
    run = read_run(workdir)
    assert list(run.heldout["step"]) == [40] and run.notes == () and np.isnan(run.train["loss"]).all()


def test_of_a_repeated_step_the_later_row_counts(make_run):
    workdir = make_run("a", loss=3.0)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "eval", "step": 20, "loss": 0.5, "bits_per_byte": 0.3, "tokens": 1}) + "\n")
    run = read_run(workdir)
    assert list(run.heldout["step"]) == [10, 20, 30, 40]
    assert run.best_loss == 0.5 and run.final_loss == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["summary.json", "inspection.npz"])
def test_torn_file_is_ignored_and_named(make_run, name):
    workdir = make_run("a", "block")
    (workdir / name).write_bytes((workdir / name).read_bytes()[:-30])
    run = read_run(workdir)
    assert not (run.summary if name == "summary.json" else run.inspection)
    assert any(f"{name} is not whole" in note for note in run.notes)
    assert run.step_seconds == pytest.approx(0.12)  # of the metrics, where there is no summary


def test_unfinished_run_is_said_to_be(make_run):
    workdir = make_run("a", status="interrupted", overrides=["training.steps=60"])
    assert read_run(workdir).notes == (f"{workdir} is interrupted: step 40 of 60.",)
    for at, done in ((43, 43), (37, 40)):
        (workdir / "summary.json").write_text(json.dumps({"status": "interrupted", "steps": at}))
        assert read_run(workdir).notes == (f"{workdir} is interrupted: step {done} of 60.",)
    (workdir / "summary.json").unlink()
    assert read_run(workdir).notes == (f"{workdir} is unfinished: step 40 of 60.",)


def test_loss_that_is_not_finite_is_not_the_best(make_run):
    workdir = make_run("a", loss=3.0)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 41, "loss": NaN, "bits_per_byte": NaN, "tokens": 9}\n')
    run = read_run(workdir)
    assert np.isnan(run.final_loss) and run.best_loss == pytest.approx(3.0)


def test_refuses_what_cannot_be_compared(make_run, tmp_path):
    with pytest.raises(RunError, match=r"workdir '.*/none' does not exist"):
        read_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not the workdir of a run"):
        read_run(tmp_path / "empty")
    workdir = make_run("a")
    rows = [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (workdir / "metrics.jsonl").write_text("\n".join(rows[:7]))
    with pytest.raises(RunError, match=r"no held-out evaluation yet \(step 7\)"):
        read_run(workdir)
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="no metrics yet"):
        read_run(workdir)
