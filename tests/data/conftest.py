import random

import pytest

from attnres_jax.config import DataConfig
from attnres_jax.data import load_text

WORDS = ["def", "return", "self", "class", "yield", "été", "数据", "🙂", "\t", "x", "=", "1", ":", "\r\n", "\n"]


@pytest.fixture
def make_corpus(tmp_path):
    """Writes `count` text files, some of them empty, and gives the config that reads them."""

    def make(count=40, folder="corpus", **changes):
        rng = random.Random(count)
        root = tmp_path / folder
        for index in range(count):
            path = root / f"part{index % 3}" / f"{index}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 60, 400]))).encode())
        settings = dict(source="text", files=f"{root}/**/*.txt", heldout_percent=20, sequence_length=16, batch_size=4)
        return DataConfig(**settings | {"cache_dir": str(tmp_path / "cache")} | changes)

    return make


@pytest.fixture
def small(make_corpus):
    """(TextData, DataConfig) of a small corpus."""
    config = make_corpus()
    return load_text(config, 300), config
