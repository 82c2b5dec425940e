"""The pipeline: documents packed into rows of T (input, target) pairs, shuffled and resumable."""

import hashlib
from typing import Any

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset
from jaxtyping import Int, Integer

from attnres_jax.config import DataConfig
from attnres_jax.data.text import TextData

Batch = dict[str, np.ndarray]
"""Arrays [B, T]: `inputs`, `targets`, `segment_ids` (1, 2, ... for the documents of a row, 0 for padding), `positions`
(from 0 in each document's piece), all int32, and `weights` (float32; 1 where the target counts, 0 in padding)."""


def train_iterator(text: TextData, config: DataConfig, *, seed: int) -> grain.DatasetIterator[Batch]:
    """Endless batches of the train split, `config.batch_size` sequences each.

    Every epoch is shuffled anew. A document of n tokens is n - 1 pairs of neighbours; pairs are laid end to end and cut
    every T, so that each token but a document's first is a target exactly once. The state is a small JSON-able dict; a
    restored iterator goes on bitwise as the saved one would.

    Of several processes each reads the whole batch: which documents share a row, and so the losses, then depend on no
    number of processes, and the state of one is that of all. It costs little: one core reads 24 M tokens a second.
    """
    documents = grain.MapDataset.source(text.train).shuffle(seed=_shuffle_seed(seed)).repeat()
    pairs = documents.map(_pairs)
    # Documents are mapped from disk and cost a copy: reader threads would only compete for the interpreter.
    stream = pairs.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    length = config.sequence_length
    rows = ConcatThenSplitIterDataset(stream, length_struct={"inputs": length, "targets": length}).map(_row)
    return _JsonRestorable(iter(rows.batch(config.batch_size, drop_remainder=True)))


def heldout_batches(text: TextData, config: DataConfig, num_sequences: int) -> list[Batch]:
    """Always the same batches [config.batch_size, T] of the held-out split, packed in the order of the corpus.

    The sequences are spread evenly over the split: its first ones would be few documents of one letter. If it has fewer
    than `num_sequences`, all are taken; the last batch is filled up with padding.
    """
    length, size = config.sequence_length, config.batch_size
    # A document of n tokens is n - 1 pairs: before its first stand the earlier documents' tokens, less one for each.
    starts = text.heldout.offsets - np.arange(len(text.heldout.offsets))
    available = -(-int(starts[-1]) // length)
    count = min(num_sequences, available)
    chosen = np.arange(count) * available // count
    batches = []
    for first in range(0, count, size):
        rows = _packed_rows(text.heldout.tokens, starts, chosen[first : first + size], length)
        batches.append({key: np.pad(value, ((0, size - len(value)), (0, 0))) for key, value in rows.items()})
    return batches


def _packed_rows(
    tokens: Integer[np.ndarray, "tokens"],
    starts: Int[np.ndarray, "documents_and_one"],
    rows: Int[np.ndarray, "B"],
    length: int,
) -> Batch:
    """Rows of the concatenated pairs by number; `starts` are the documents' first pairs and the number of all."""
    wanted = rows[:, None] * length + np.arange(length)
    real = wanted < starts[-1]
    pair = np.minimum(wanted, starts[-1] - 1)
    document = np.searchsorted(starts, pair, side="right") - 1
    batch = {
        "inputs": tokens[pair + document],
        "targets": tokens[pair + document + 1],
        "segment_ids": document - document[:, :1] + 1,
        "positions": pair - np.maximum(starts[document], pair[:, :1]),
    }
    return {key: value.astype(np.int32) * real for key, value in batch.items()} | {"weights": real.astype(np.float32)}


def _pairs(document: Int[np.ndarray, "n"]) -> dict[str, np.ndarray]:
    return {"inputs": document[:-1], "targets": document[1:]}


def _row(packed: dict[str, np.ndarray]) -> Batch:
    segment_ids = packed["inputs_segment_ids"]
    return {
        "inputs": packed["inputs"],
        "targets": packed["targets"],
        "segment_ids": segment_ids,
        "positions": packed["inputs_positions"],
        "weights": (segment_ids > 0).astype(np.float32),
    }


def _shuffle_seed(seed: int) -> int:
    """Spreads seeds: grain shuffles epoch e by seed + e, so that seed 1 would repeat the second epoch of seed 0."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])


class _JsonRestorable(grain.DatasetIterator):
    """Takes a state back from JSON.

    ConcatThenSplit compares its slices with tuples, which JSON returns as lists: a state saved where a row ends with
    its document would lose the next document.
    """

    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(_tuples(state))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
