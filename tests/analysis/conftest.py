"""Run folders as training leaves them: written by a function where only the numbers matter, and one really trained."""

import dataclasses
import json

import numpy as np
import pytest
from small_runs import ROOT, small_overrides

from attnres_jax.analysis import inspect_run
from attnres_jax.config import load_config
from attnres_jax.training import train

TOKENS = 2048  # of a step of the runs that are only written


@pytest.fixture
def make_run(tmp_path):
    """`make_run("a", "block", seed=1, loss=3.0)` writes a finished run of configs/tiny.py and returns its workdir."""

    def make(name, rule="residual", *, seed=0, loss=3.0, overrides=(), steps=40, inspected=True, **summary):
        config = load_config(
            f"{ROOT}/configs/tiny.py:residual={rule},seed={seed}", [f"training.steps={steps}", *overrides]
        )
        workdir = tmp_path / name
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        seconds = 0.1 if rule == "residual" else 0.12
        rows = []
        for step in range(1, steps + 1):
            totals = {"tokens": step * TOKENS, "flops": step * TOKENS * 1e7, "seconds": step * seconds}
            now = loss + 2.0 * (1 - step / steps)
            speed = {"tokens_per_second": TOKENS / seconds, "step_seconds": seconds}
            rows.append({"kind": "train", "step": step, "loss": now + 0.1, "bits_per_byte": now / 2} | totals | speed)
            if step % 10 == 0:
                rows.append({"kind": "eval", "step": step, "loss": now, "bits_per_byte": now / 2} | totals)
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        end = {"status": "finished", "parameters": 1234567, "compile_seconds": 4.2, "peak_memory_bytes": 300 * 2**20}
        end |= {"tokens_per_second": TOKENS / seconds, "step_seconds": seconds, "device": "cpu (2 cores)"}
        end |= {"versions": {"python": "3.11.7", "jax": "0.10.2"}, "date": "2026-11-20T10:00:00+00:00"}
        (workdir / "summary.json").write_text(json.dumps(end | summary))
        if inspected:
            np.savez(workdir / "inspection.npz", **inspection(rule))
        return workdir

    return make


def inspection(rule, sublayers=4):
    sites = [*(f"{kind} {layer}" for layer in (1, 2) for kind in ("attention", "MLP")), "readout"]
    arrays = {key: np.linspace(1, 2, sublayers) for key in ("output_rms", "state_rms", "gradient_rms")}
    arrays |= {"input_rms": np.linspace(1, 2, sublayers + 1), "site_labels": np.array(sites)}
    matrix = np.where(np.tri(sublayers + 1), 1.0, np.nan)
    if rule == "denseformer":
        matrix[2, 1] = -0.5
    arrays |= {"mixing_matrix": matrix, "output_labels": np.array(["embedding", *sites[:-1]])}
    if rule not in ("residual", "mhc"):
        weights = np.array(
            [[1, np.nan, np.nan], [0.6, 0.4, np.nan], [0.3, 0.7, np.nan], [0.2, 0.3, 0.5], [0.1, 0.3, 0.6]]
        )
        arrays |= {"depth_weights": weights, "source_labels": np.array(["embedding", "block 1", "block 2"])}
    return arrays


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Overrides that make configs/tiny.py a matter of seconds, on a text of its own."""
    changes = {"optimizer.warmup_steps": 2, "training.steps": 8, "training.eval_every": 4}
    return small_overrides(tmp_path_factory, changes)


@pytest.fixture(scope="session")
def real_run(small, tmp_path_factory):
    """A block run, really trained and inspected; not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "block"
    diagnostics = ["metrics.depth=true", "metrics.every=3"]  # so that steps 3 and 6 of 8 are measured
    train(load_config(f"{ROOT}/configs/tiny.py:residual=block,block_size=2", [*small, *diagnostics]), workdir)
    inspect_run(workdir)
    return workdir
