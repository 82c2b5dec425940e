"""Run folders as training leaves them: written by a function where only the numbers matter, and one really trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from attnres_jax.analysis import inspect_run
from attnres_jax.config import load_config
from attnres_jax.training import train

ROOT = Path(__file__).parents[2]
TOKENS = 8 * 256  # of a step of configs/tiny.py
SMALL = {
    "model.vocab_size": 300,
    "model.width": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.mlp_width": 32,
    "model.max_length": 32,
    "model.depth.block_size": 2,
    "data.source": "text",
    "data.heldout_percent": 20,
    "data.sequence_length": 32,
    "data.batch_size": 4,
    "optimizer.warmup_steps": 2,
    "training.steps": 8,
    "training.log_every": 1,
    "training.eval_every": 4,
    "training.eval_sequences": 8,
    "training.checkpoint_every": 4,
}


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
    if rule != "residual":
        weights = np.array(
            [[1, np.nan, np.nan], [0.6, 0.4, np.nan], [0.3, 0.7, np.nan], [0.2, 0.3, 0.5], [0.1, 0.3, 0.6]]
        )
        arrays |= {"depth_weights": weights, "source_labels": np.array(["embedding", "block 1", "block 2"])}
    return arrays


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Overrides that make configs/tiny.py a matter of seconds, on a text of its own."""
    folder = tmp_path_factory.mktemp("text")
    for document in range(12):
        lines = (f"document {document} says {document * line * 7919 % 1000} in line {line}\n" for line in range(40))
        (folder / f"{document}.txt").write_text("".join(lines))
    settings = SMALL | {"data.files": folder / "*.txt", "data.cache_dir": tmp_path_factory.mktemp("cache")}
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def real_run(small, tmp_path_factory):
    """A block run, really trained and inspected; not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "block"
    train(load_config(f"{ROOT}/configs/tiny.py:residual=block,block_size=2", small), workdir)
    inspect_run(workdir)
    return workdir
