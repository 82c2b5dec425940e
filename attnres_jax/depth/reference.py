"""The plain forms, differentiated by JAX: what every faster form is held to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.depth.sites import Sites


class Plain(NamedTuple):
    """A whole stack run as a plain loop, everything kept."""

    inputs: list[Float[Array, "*batch D"]]
    """What each sublayer read, then what the output head read."""
    outputs: list[Float[Array, "*batch D"]]
    """What each sublayer returned."""
    states: list[Float[Array, "*batch D"]]
    """After each sublayer: the stream, or the block's partial sum."""
    weights: list[Float[Array, "sources *batch"]] | None
    """The depth weights of each site; None where the rule has none."""


def plain_depth_attention(
    sources: Sequence[Float[Array, "*batch D"]],
    query: Float[Array, " D"],
    key_scale: Float[Array, " D"],
    *,
    eps: float = 1e-6,
) -> tuple[Float[Array, "*batch D"], Float[Array, "N *batch"]]:
    """Equations 2 to 4 as they stand: (the mix, in the sources' dtype; its float32 weights)."""
    values = jnp.stack(sources)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    keys = key_scale * values * jax.lax.rsqrt(jnp.mean(values**2, axis=-1, keepdims=True) + eps)
    weights = jax.nn.softmax(jnp.einsum("n...d,d->n...", keys, query, precision="highest"), axis=0)
    mixed = jnp.einsum("n...,n...d->...d", weights, values, precision="highest")
    return mixed.astype(sources[0].dtype), weights


def plain_block_attention_residuals(
    sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Callable], block_size: int, eps: float
) -> Plain:
    """Equations 5 and 6 as they stand; with `block_size` 1 every output is a block of its own: equations 1 to 4."""
    plain = Plain([], [], [], [])
    blocks, partial = [embedding], None
    for site, sublayer in enumerate(sublayers):
        if site % block_size == 0 and partial is not None:
            blocks, partial = [*blocks, partial], None
        sources = blocks if partial is None else [*blocks, partial]
        h, weights = plain_depth_attention(sources, *sites.at(site), eps=eps)
        y = sublayer(h)
        partial = y if partial is None else partial + y
        for kept, value in zip(plain, (h, y, partial, weights), strict=True):
            kept.append(value)
    h, weights = plain_depth_attention([*blocks, partial], *sites.at(len(sublayers)), eps=eps)
    plain.inputs.append(h)
    plain.weights.append(weights)
    return plain
