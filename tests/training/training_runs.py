"""What the tests of runs share: a small configuration, and a run's history."""

import os
import sys
from pathlib import Path

import jax

from attnres_jax.training.records import read_rows

ROOT = Path(__file__).parents[2]
SETTINGS = {
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
    "optimizer.warmup_steps": 4,
    "training.steps": 40,
    "training.log_every": 1,
    "training.eval_every": 10,
    "training.eval_sequences": 8,
    "training.checkpoint_every": 4,
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
