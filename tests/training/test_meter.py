"""Metrics a step late, honest clocks, and the line a person sees."""

import time

import jax.numpy as jnp
import pytest

from attnres_jax.training import NonFiniteError
from attnres_jax.training.meter import Meter
from attnres_jax.training.progress import Progress


def metrics(loss=2.0, finite=True):
    values = {"loss": loss, "bits_per_byte": 1.0, "learning_rate": 0.1, "grad_norm": 3.0, "grad_norm/mlp": 0.5}
    return {key: jnp.float32(value) for key, value in values.items()} | {"finite": jnp.asarray(finite)}


def meter_into(rows, is_due=lambda step: True, **settings):
    settings = {"start": 0, "seconds": 0.0, "tokens_per_step": 10, "flops_per_token": 7, "peak_flops": None} | settings
    return Meter(is_due=is_due, emit=rows.append, **settings)


def test_a_step_is_looked_at_when_the_next_one_is_under_way():
    rows = []
    meter = meter_into(rows)
    meter.push(1, metrics(2.0))
    assert rows == []
    meter.push(2, metrics(1.0))
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0)]
    meter.flush()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 1.0)]
    meter.flush()
    assert len(rows) == 2


def test_every_step_is_checked_whether_or_not_it_is_logged():
    rows = []
    meter = meter_into(rows, is_due=lambda step: False)
    meter.push(6, metrics())
    meter.push(7, metrics(float("nan"), finite=False))
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        meter.push(8, metrics())
    assert rows == []


def test_what_is_paused_is_not_counted_and_earlier_processes_are():
    rows = []
    meter = meter_into(rows, start=4, seconds=100.0)
    meter.push(5, metrics())
    with meter.paused():
        time.sleep(0.3)
    meter.push(6, metrics())
    meter.flush()
    assert 100 < rows[0]["seconds"] < rows[1]["seconds"] < 100.2
    assert rows[1]["tokens"] == 60
    assert rows[1]["flops"] == 420


def test_speed_is_over_the_steps_since_the_last_row():
    rows = []
    meter = meter_into(rows, is_due=lambda step: step == 4, start=2, peak_flops=1000.0)
    for step in (3, 4, 5):
        time.sleep(0.05)
        meter.push(step, metrics())
    (row,) = rows
    assert row["step_seconds"] == pytest.approx(row["seconds"] / 2)
    assert row["tokens_per_second"] == pytest.approx(10 / row["step_seconds"])
    assert row["utilisation"] == pytest.approx(7 * row["tokens_per_second"] / 1000)


def test_without_a_terminal_there_are_plain_lines(capsys):
    row = {"kind": "train", "loss": 2.5, "tokens_per_second": 12345.6, "step_seconds": 2.0}
    with Progress("name", 0, 40) as progress:
        for step in (1, 2, 40):  # the second follows too soon to deserve a line
            progress.advance()
            progress.show(row | {"step": step})
        progress.show({"kind": "eval", "step": 40, "loss": 2.25, "bits_per_byte": 1.5})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/40  loss 2.5000  12,346 tokens/s  0:01:18 left",
        "step 40/40  loss 2.5000  12,346 tokens/s  0:00:00 left",
        "step 40: held-out loss 2.2500, 1.5000 bits per byte",
    ]
