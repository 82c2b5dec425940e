"""What the tests of runs share: how long they are, and a run's history."""

import os
import sys
from pathlib import Path

import jax
from small_runs import ROOT

from attnres_jax.training.records import read_rows

SETTINGS = {
    "seed": 3,
    "optimizer.warmup_steps": 4,
    "training.steps": 40,
    "training.eval_every": 10,
    "training.keep_checkpoints": 20,
}


def history(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    measured = ("seconds", "tokens_per_second", "step_seconds")
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *flags]


def environment() -> dict[str, str]:
    """This process's, with its cache of compiled programs."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
