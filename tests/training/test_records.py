"""metrics.jsonl and TensorBoard over a kill, and the summary."""

import json
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog

from attnres_jax.config import Config
from attnres_jax.training.records import Records, read_rows, read_summary, write_summary


def row(step, kind="train", **values):
    return {"kind": kind, "step": step, "loss": 10.0 - step} | values


def events(folder):
    """TensorBoard's records: length, checksum, event, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_rows_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path):
    with Records(tmp_path, 0) as records:
        for step in range(1, 6):
            records.write(row(step))
        records.write(row(5, kind="eval"))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    with Records(tmp_path, 3) as records:
        records.write(row(4, again=True))
    assert read_rows(path) == [row(1), row(2), row(3), row(4, again=True)]


def test_rows_after_a_broken_one_stay(tmp_path):
    """As a crashed disk leaves it."""
    with Records(tmp_path, 0) as records:
        for step in range(1, 6):
            records.write(row(step))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "\0" * 20, *lines[3:]]))
    with Records(tmp_path, 4):
        pass
    assert read_rows(path) == [row(1), row(2), row(4)]


def test_rows_up_to_the_checkpoint_keep_their_bytes(tmp_path):
    with Records(tmp_path, 0) as records:
        records.write(row(1, tiny=1.2345678901234567e-17, whole=3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Records(tmp_path, 1):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with Records(tmp_path, 0) as records:
        records.write(row(1))
        assert read_rows(tmp_path / "metrics.jsonl") == [row(1)]


def test_tensorboard_is_told_which_steps_are_written_anew(tmp_path):
    with Records(tmp_path, 0) as records:
        records.write(row(1) | {"grad_norm/mlp": 2.0})
    with Records(tmp_path, 3) as records:
        records.write(row(4, kind="eval"))
    found = events(tmp_path / "tensorboard")
    assert [event.step for event in found if event.session_log.status == SessionLog.START] == [1, 4]
    tags = {(event.step, value.tag): value.simple_value for event in found for value in event.summary.value}
    assert tags == {(1, "train/loss"): 9.0, (1, "grad_norm/mlp"): 2.0, (4, "eval/loss"): 6.0}


def test_summary_is_drawn_from_the_rows(tmp_path):
    speeds = {1: (100.0, 0.5), 2: (300.0, 0.1), 3: (200.0, 0.2)}
    with Records(tmp_path, 0) as records:
        for step, (tokens_per_second, step_seconds) in speeds.items():
            records.write(row(step, tokens_per_second=tokens_per_second, step_seconds=step_seconds))
        for step, loss in ((1, 4.0), (2, 3.0), (3, 3.5)):
            records.write(row(step, kind="eval", bits_per_byte=loss / 2) | {"loss": loss})
    given = {"status": "finished", "steps": 3, "tokens": 30, "parameters": 7, "flops_per_token": 9}
    measured = {"compile_seconds": 1.5, "peak_memory_bytes": 11}
    summary = write_summary(tmp_path, Config(name="n", seed=4), **given, **measured)
    assert summary == read_summary(tmp_path) == json.loads((tmp_path / "summary.json").read_text())
    expected = given | measured | {"name": "n", "seed": 4, "rule": "block"}
    expected |= {"final_loss": 3.5, "best_loss": 3.0, "final_bits_per_byte": 1.75, "best_bits_per_byte": 1.5}
    expected |= {"tokens_per_second": 200.0, "step_seconds": 0.2}
    assert {key: summary[key] for key in expected} == expected
    assert set(summary) - set(expected) == {"device", "versions", "date"}


def test_summary_of_a_run_without_rows_holds_none(tmp_path):
    given = {"status": "interrupted", "steps": 1, "tokens": 1, "parameters": 1, "flops_per_token": 1}
    summary = write_summary(tmp_path, Config(), **given)
    assert summary["final_loss"] is None
    assert summary["tokens_per_second"] is None
    assert read_summary(tmp_path) == summary
