"""A text and a configuration that make configs/tiny.py a matter of seconds."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    "training.log_every": 1,
    "training.eval_sequences": 8,
    "training.checkpoint_every": 4,
}


def small_overrides(tmp_path_factory: pytest.TempPathFactory, changes: dict) -> list[str]:
    """`SMALL` and `changes` on a text of their own, as on the command line."""
    folder = tmp_path_factory.mktemp("text")
    for document in range(12):
        lines = (f"document {document} says {document * line * 7919 % 1000} in line {line}\n" for line in range(40))
        (folder / f"{document}.txt").write_text("".join(lines))
    paths = {"data.files": folder / "*.txt", "data.cache_dir": tmp_path_factory.mktemp("cache")}
    return [f"{key}={value}" for key, value in (SMALL | changes | paths).items()]
