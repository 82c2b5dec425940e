"""The plain forms, differentiated by JAX: what every faster form is held to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.depth.operator import wide
from attnres_jax.depth.options import DEFAULTS, Options
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
    matrix: list[Float[Array, "sources *batch"]] | None = None
    """What each site effectively reads: the weights of the embedding and of each earlier output, in order."""


def plain_depth_attention(
    sources: Sequence[Float[Array, "*batch D"]],
    query: Float[Array, " D"],
    key_scale: Float[Array, " D"],
    *,
    eps: float = 1e-6,
) -> tuple[Float[Array, "*batch D"], Float[Array, "N *batch"]]:
    """Equations 2 to 4 as they stand: (the mix, in the sources' dtype; its float32 weights)."""
    values = wide(jnp.stack(sources))
    keys = key_scale * values * jax.lax.rsqrt(jnp.mean(values**2, axis=-1, keepdims=True) + eps)
    weights = jax.nn.softmax(jnp.einsum("n...d,d->n...", keys, query, precision="highest"), axis=0)
    mixed = jnp.einsum("n...,n...d->...d", weights, values, precision="highest")
    return mixed.astype(sources[0].dtype), weights


def plain_site(
    sites: Sites, site: int, sources: Sequence[Float[Array, "*batch D"]], eps: float, options: Options
) -> tuple[Float[Array, "*batch D"], Float[Array, "N *batch"]]:
    """What a site reads of its sources, oldest first, and its weights (with heads, their mean), under any options."""
    values = wide(jnp.stack(sources))
    count, over_batch = len(values), [1] * (values.ndim - 1)
    groups = values.reshape(*values.shape[:-1], options.heads, -1)
    if options.query == "none":
        logits = jnp.broadcast_to(sites.source_logit[site, :count].reshape(-1, *over_batch), groups.shape[:-1])
    else:
        query, key_scale = sites.at(site)
        query = query if site else jnp.zeros_like(query)
        if options.query == "input":
            newest = unit_rms(values[-1], eps)
            query = query + jnp.matmul(newest, sites.query_projection[site], precision="highest")
        keys = values * _reciprocal_rms(values, eps)[..., None] if options.key_norm else values
        products = (keys * (wide(query) * wide(key_scale))).reshape(groups.shape)
        logits = products.sum(-1)
    if options.recency_bias:
        logits = logits.at[-1].add(sites.recency[site])
    if options.window:
        seen = (jnp.arange(count) >= count - options.window).at[0].set(True)
        logits = jnp.where(seen.reshape(-1, *over_batch), logits, -jnp.inf)
    weights = jax.nn.sigmoid(logits) if options.weights == "sigmoid" else jax.nn.softmax(logits, axis=0)
    mixed = jnp.einsum("n...h,n...hd->...hd", weights, groups, precision="highest").reshape(values.shape[1:])
    return mixed.astype(sources[0].dtype), weights.mean(-1)


def plain_attention_residuals(
    sites: Sites,
    embedding: Float[Array, "*batch D"],
    sublayers: Sequence[Callable],
    block_size: int,
    eps: float,
    options: Options = DEFAULTS,
    *,
    normalise_outputs: bool = False,
) -> Plain:
    """Equations 5 and 6 as they stand; with `block_size` 1 every output is a block of its own: equations 1 to 4.

    With `normalise_outputs`, a completed block is the sum of its outputs at unit RMS (`rms_block`).
    """
    plain = Plain([], [], [], [], [])
    completed, own = [], []
    for site in range(len(sublayers) + 1):
        if own and (site % block_size == 0 or site == len(sublayers)):
            completed, own = [*completed, _block(own, eps if normalise_outputs else None)], []
        blocks = [*completed, _block(own)] if own else completed
        h, weights = plain_site(sites, site, [embedding, *(block.value for block in blocks)], eps, options)
        plain.weights.append(weights)
        if options.sum_sources:
            h, weights = h * len(weights), weights * len(weights)
        plain.inputs.append(h)
        plain.matrix.append(jnp.stack([weights[0], *_spread(weights[1:], blocks)]))
        if site < len(sublayers):
            own = [*own, sublayers[site](h)]
            plain.outputs.append(own[-1])
            plain.states.append(own[0] if len(own) == 1 else plain.states[-1] + own[-1])
    return plain


def plain_delta_attention_residuals(
    sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Callable], block_size: int, eps: float
) -> Plain:
    """The residual stream plus attention over a null source and the sums of completed blocks (`delta_block`).

    With `block_size` 1 every output is a source (`delta`). Column 0 of the weights is the null source.
    """
    plain = Plain([], [], [], [], [])
    completed, own, stream = [], [], embedding
    for site in range(len(sublayers) + 1):
        if own and (site % block_size == 0 or site == len(sublayers)):
            completed, own = [*completed, _block(own)], []
        sources = [jnp.zeros_like(embedding), *(block.value for block in completed)]
        mixed, weights = plain_depth_attention(sources, *sites.at(site), eps=eps)
        plain.inputs.append(stream + mixed)
        plain.weights.append(weights)
        zero = jnp.zeros_like(weights[0])
        plain.matrix.append(1 + jnp.stack([zero, *_spread(weights[1:], completed), *[zero] * len(own)]))
        if site < len(sublayers):
            own = [*own, sublayers[site](plain.inputs[-1])]
            plain.outputs.append(own[-1])
            stream = stream + own[-1]
            plain.states.append(stream)
    return plain


def unit_rms(y: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch D"]:
    """An output divided by its root mean square, in float32 or wider and then in its own dtype."""
    return (wide(y) * _reciprocal_rms(y, eps)[..., None]).astype(y.dtype)


class _Block(NamedTuple):
    value: Float[Array, "*batch D"]
    coefficients: list[Float[Array, "*batch"]]  # of each output that the value sums


def _block(own: list, eps: float | None = None) -> _Block:
    """A block of outputs as a source; with `eps`, each output is divided by its root mean square."""
    if eps is None:
        return _Block(sum(own[1:], own[0]), [jnp.ones(own[0].shape[:-1])] * len(own))
    return _Block(sum(unit_rms(y, eps) for y in own), [_reciprocal_rms(y, eps) for y in own])


def _spread(weights, blocks) -> list[Float[Array, "*batch"]]:
    """A weight for each output from a weight for each block."""
    pairs = zip(weights, blocks, strict=True)
    return [weight * coefficient for weight, block in pairs for coefficient in block.coefficients]


def _reciprocal_rms(y, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide(y)), axis=-1) + eps)
