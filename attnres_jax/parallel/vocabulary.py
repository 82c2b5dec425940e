"""Embedding and output head of a pipeline: the vocabulary is cut over the stages, and all of them work on it at once.

Were they on the first and the last stage, those would have more to do than the others, and everyone would wait. Cut in
P parts, each stage looks up, multiplies and differentiates 1/P of the vocabulary: the hidden states of a microbatch go
from the last stage to all, and sums of one number a token and of the cotangent come back (Yeung et al. 2024,
arXiv 2411.05288). For use inside `shard_map`, with the table's first axis split.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnres_jax.axes import constrain
from attnres_jax.layers import Embedding


class HeadResult(NamedTuple):
    """What the head makes of a microbatch; `nll` and `log_z` are the same on all stages."""

    nll: Float[Array, "B T"]
    log_z: Float[Array, "B T"]
    h_bar: Float[Array, "B T D"]
    table_bar: Embedding


def look_up(table: Embedding, tokens: Int[Array, "B T"], axis: str) -> Float[Array, "B T D"]:
    """The tokens' embeddings, whole on every stage."""
    own, is_own = _own(table, tokens, axis)
    return over_stages(jnp.where(is_own[..., None], table(own), 0), axis)


def look_up_transpose(
    table: Embedding, tokens: Int[Array, "B T"], embedding_bar: Float[Array, "B T D"], axis: str
) -> Embedding:
    """The table's gradient, from the cotangent of `look_up`, which is the same on every stage."""
    own, is_own = _own(table, tokens, axis)
    _, pullback = jax.vjp(lambda table: table(own), table)
    return pullback(jnp.where(is_own[..., None], embedding_bar, 0))[0]


def over_stages(x: Float[Array, "*batch D"], axis: str) -> Float[Array, "*batch D"]:
    """The sum over all stages, in float32: of bfloat16 XLA on CPU cannot compile it inside `shard_map`."""
    return jax.lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis).astype(x.dtype)


def at_rest(table: Embedding) -> Embedding:
    """The table or its gradient, split as at rest and as a derivative of the table leaves it."""
    return jax.tree.map(lambda x: constrain(x, "vocab", "width"), table)


def head(
    table: Embedding,
    h: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    scale: Float[Array, "B T"],
    z_loss: float,
    axis: str,
) -> HeadResult:
    """The loss of every token and the gradient of sum(scale * (nll + z_loss * log_z^2)).

    Args:
      table: this stage's part.
      h: after the final norm, the same on every stage.
      targets: token ids.
      scale: what each token counts.
      z_loss: weight of the squared log-partition.
      axis: the mesh axis of the stages.
    """
    logits, pullback = jax.vjp(lambda table, h: table.logits(h), table, h)
    own, is_own = _own(table, targets, axis)
    highest = jax.lax.pmax(jnp.max(logits, axis=-1), axis)
    log_z = highest + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), axis))
    # A sum and no gather: XLA cannot gather along an axis that `tensor` splits here.
    hit = is_own[..., None] & (own[..., None] == jnp.arange(logits.shape[-1]))
    nll = log_z - jax.lax.psum(jnp.sum(jnp.where(hit, logits, 0), axis=-1), axis)
    softmax = jnp.exp(logits - log_z[..., None])
    logits_bar = scale[..., None] * ((1 + 2 * z_loss * log_z)[..., None] * softmax - hit)
    table_bar, h_bar = pullback(logits_bar)
    h_bar = over_stages(h_bar, axis)
    return HeadResult(nll, log_z, h_bar, table_bar)


def _own(table: Embedding, tokens: Int[Array, "B T"], axis: str) -> tuple[Int[Array, "B T"], Array]:
    """(places in this stage's part of the table, whether the token is there)."""
    size = table.table.shape[0]
    local = tokens - jax.lax.axis_index(axis) * size
    is_own = (local >= 0) & (local < size)
    return jnp.where(is_own, local, 0), is_own
