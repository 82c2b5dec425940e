"""What every sublayer of a forward pass sees beside its input: positions and who may attend to whom."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnres_jax.axes import constrain
from attnres_jax.layers.rotary import RopeScaling, rotary_tables


class Context(NamedTuple):
    """Computed once a forward pass, since nothing in it depends on depth."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]
    same_document: Bool[Array, "B 1 T T"] | None
    """None: the whole row is one document. The causal mask comes on top."""
    segment_ids: Int[Array, "B T"] | None = None
    """The document of each token, 0 for padding. None: the whole row is one document."""


def make_context(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Context:
    """The context of a batch; without `positions`, they count from 0 in every row. Masks are split by the query."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    same = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    same = None if same is None else constrain(same, "batch", None, "length", None)
    return Context(*rotary_tables(positions, head_dim, theta, scaling), same, segment_ids)
