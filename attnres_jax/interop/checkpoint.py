"""A checkpoint directory, opened: its model, and every tensor held to what the model needs."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from attnres_jax.config import ModelConfig
from attnres_jax.interop.binding import Binding, bind, check, embedding_name, fit, tied_head
from attnres_jax.interop.config_json import num_further_layers, read_config_json
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.store import TensorStore
from attnres_jax.interop.tables import TABLES
from attnres_jax.models import Decoder, Family, named_leaves


class Checkpoint(NamedTuple):
    """A directory that can be loaded."""

    family: Family
    config: ModelConfig
    values: dict[str, Any]
    """`config.json`."""
    store: TensorStore
    bindings: list[Binding]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads settings and headers, and the head of a tied model where one is stored.

    Raises:
      InteropError: one line, for whatever is missing, extra, misshapen, damaged or not supported.
    """
    family, config, values = read_config_json(directory)
    store, table, shapes = TensorStore(directory), TABLES[family.model_type], abstract_model(config)
    bindings = fit(bind(table, named_leaves(shapes), shapes.plan()), store.entries)
    check(table, bindings, store.entries, directory, num_further_layers(family, values))
    for binding in bindings:
        store.dtype(binding.theirs)
    _check_tied_head(store, tied_head(table, bindings, store.entries), embedding_name(bindings))
    return Checkpoint(family, config, values, store, bindings)


def abstract_model(config: ModelConfig) -> Decoder:
    """Shapes, without computing anything."""
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def _check_tied_head(store: TensorStore, head: str | None, embedding: str) -> None:
    """A stored head of a tied model has to be the embedding."""
    if head is None:
        return
    rows, step = store.entries[embedding].shape[0], 4096
    same = store.entries[head].shape == store.entries[embedding].shape and all(
        np.array_equal(store.read(head, at), store.read(embedding, at))
        for at in ((slice(start, min(start + step, rows)),) for start in range(0, rows, step))
    )
    if not same:
        raise InteropError(f"{store.directory}: tie_word_embeddings is true, but {head} is not {embedding}")
