"""`lambdas`: x_l = r_l h_l + s_l h_0, h_{l+1} = x_l + f_l(x_l): learned scalars on the stream and on the embedding.

The resid_lambdas and x0_lambdas of nanochat (github.com/karpathy/nanochat, after modded-nanogpt). There a layer has one
pair, before its attention; here every sublayer has one. nanochat's h_0 is the normalised embedding; here it is what the
model's embedding returns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.operator import wide
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Sublayer
from attnres_jax.depth.stream import StreamRule


class LambdaSites(nnx.Module):
    """Two scalars a sublayer."""

    def __init__(self, num_sublayers: int):
        self.stream_scale = nnx.Param(jnp.ones(num_sublayers))
        self.embedding_scale = nnx.Param(jnp.zeros(num_sublayers))


class Stream(NamedTuple):
    """The residual stream, and the embedding, which every sublayer may add again."""

    state: Float[Array, "*batch D"]
    embedding: Float[Array, "*batch D"]


class Lambdas(StreamRule):
    """Starts as the residual baseline: the stream times one, the embedding times zero."""

    def init_sites(self, num_sublayers: int, width: int) -> LambdaSites:
        """One and zero."""
        return LambdaSites(num_sublayers)

    def begin(self, sites: LambdaSites, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block."""
        return Stream(embedding, embedding), None

    def step(self, sites: LambdaSites, site: int | Int[Array, ""], stream: Stream, sublayer: Sublayer) -> Stream:
        """Scales the stream, adds the embedding, then the output."""
        x = sites.stream_scale[site] * wide(stream.state) + sites.embedding_scale[site] * wide(stream.embedding)
        x = x.astype(stream.state.dtype)
        return Stream(x + sublayer(x), stream.embedding)

    def readout(self, sites: LambdaSites, stream: Stream, newest: None, bank: None) -> Float[Array, "*batch D"]:
        """What the output head reads."""
        return stream.state

    def plain(self, sites: LambdaSites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        plain, state = Plain([], [], [], None, []), embedding
        row = jnp.ones((1,), jnp.promote_types(embedding.dtype, jnp.float32))
        for site, sublayer in enumerate(sublayers):
            scale, again = sites.stream_scale[site], sites.embedding_scale[site]
            x = (scale * wide(state) + again * wide(embedding)).astype(embedding.dtype)
            row = (scale * row).at[0].add(again)
            plain.inputs.append(x)
            plain.matrix.append(_over(row, embedding))
            plain.outputs.append(sublayer(x))
            state = x + plain.outputs[-1]
            plain.states.append(state)
            row = jnp.append(row, 1)
        plain.inputs.append(state)
        plain.matrix.append(_over(row, embedding))
        return plain


def _over(row: Float[Array, " sources"], embedding: Float[Array, "*batch D"]) -> Float[Array, "sources *batch"]:
    batch = embedding.shape[:-1]
    return jnp.broadcast_to(row.reshape(-1, *[1] * len(batch)), (len(row), *batch))
