"""From sources to weights where an option departs from the paper: keys, window, recency, sigmoid (its ablations)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnres_jax.depth.operator import HIGHEST, State, exponents, wide
from attnres_jax.depth.options import Options


def group_logits(
    sources: Float[Array, "... H d"],
    queries: Float[Array, "S ... D"],
    key_scales: Float[Array, "S D"] | None,
    eps: float,
) -> Float[Array, "S ... H"]:
    """Logits by group of channels: the inner product of query and key over each group alone.

    Args:
      sources: channels cut into H groups.
      queries: of S sites; the same for all tokens, or each token's own.
      key_scales: gains of the RMSNorm over all D channels of a source; None: the source itself is the key.
      eps: added to the mean square of a source.
    """
    keys = wide(sources)
    if key_scales is not None:
        keys = keys * jax.lax.rsqrt(jnp.mean(keys * keys, axis=(-2, -1), keepdims=True) + eps)
        scales = key_scales.astype(keys.dtype).reshape(len(key_scales), *[1] * (queries.ndim - 2), -1)
        queries = queries.astype(keys.dtype) * scales
    queries = queries.reshape(*queries.shape[:-1], *sources.shape[-2:]).astype(keys.dtype)
    letters = "s...hd" if queries.ndim > 3 else "shd"
    return jnp.einsum(f"...hd,{letters}->s...h", keys, queries, precision=HIGHEST)


def adjust(
    logits: Float[Array, "K S *batch"],
    ages: Int[Array, "K S"],
    is_embedding: Sequence[bool] | Bool[Array, " K"],
    recency: Float[Array, " S"] | None,
    options: Options,
) -> Float[Array, "K S *batch"]:
    """Window and recency: what is out of a site's sight gets -inf, its newest source the site's scalar.

    Args:
      logits: of K sources at S sites.
      ages: how many sources are newer, at each site.
      is_embedding: [K], whether a source is the embedding, which is always in sight.
      recency: each site's scalar.
      options: `window` is read.
    """
    over_batch = lambda x: x.reshape(*x.shape, *[1] * (logits.ndim - 2))  # noqa: E731
    if recency is not None:
        logits = logits + over_batch(jnp.where(ages == 0, recency, 0.0).astype(logits.dtype))
    if options.window:
        seen = jnp.asarray(is_embedding)[:, None] | (ages < options.window)
        logits = jnp.where(over_batch(seen), logits, -jnp.inf)
    return logits


def to_weights(logits: Float[Array, "N S *batch"], num_valid: int | Int[Array, ""], options: Options):
    """(weights, maximum, denominator) as `exponents` returns them; sigmoid weights are whole already."""
    if options.weights == "softmax":
        return exponents(logits, num_valid)
    valid = jnp.arange(len(logits)).reshape(-1, *[1] * (logits.ndim - 1)) < num_valid
    zeros = jnp.zeros_like(logits[0])
    return jax.nn.sigmoid(jnp.where(valid, logits, -jnp.inf)), zeros, zeros + 1


def weights_transpose(
    weights: Float[Array, "..."],
    weights_bar: Float[Array, "..."],
    offset: Float[Array, "S *batch"],
    options: Options,
) -> Float[Array, "..."]:
    """From the cotangents of the weights of a source, or of more along a leading axis, those of their logits.

    Args:
      weights: of `to_weights`; divided by their sum where the softmax is over these sources alone.
      weights_bar: their cotangents.
      offset: for a softmax, what every cotangent is taken relative to: their weighted mean where the weights have been
        divided, else the cotangent of their sum with a minus. It has no part in a sigmoid.
      options: `weights` is read.
    """
    if options.weights == "softmax":
        return weights * (weights_bar - offset)
    return weights * (1 - weights) * weights_bar


def merge_sigmoid(
    state: State, sources: Sequence[Float[Array, "*batch D"]], logits: Float[Array, "K *batch"]
) -> Float[Array, "*batch D"]:
    """`merge_sources` for sigmoid weights: nothing is divided, the parts add up."""
    weights = jax.nn.sigmoid(logits)
    own = sum(weight[..., None] * wide(source) for weight, source in zip(weights, sources, strict=True))
    return (state.numerator + own).astype(sources[0].dtype)
