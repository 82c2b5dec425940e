"""`hyper_connections`: n parallel streams H, from which every sublayer reads and to which it writes by learned weights.

    h = sum_i pre_i H_i,    H_i <- sum_j carry_ij H_j + post_i f(h)

Hyper-Connections (Zhu et al. 2024, arXiv 2409.19606), the dynamic variant: weights are a static part plus a small
tanh-bounded part that each stream's normalised state decides. The norm is an RMSNorm without gain,
which the projections contain. All streams start as the embedding; the head reads their sum.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.operator import HIGHEST, wide
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Sublayer
from attnres_jax.depth.stream import StreamRule

INITIAL_GATE = 0.01  # of the dynamic parts: HC, and mHC's table A.1


class Mixing(NamedTuple):
    """The weights of one sublayer, float32: what it reads, where it writes, and what the streams keep."""

    pre: Float[Array, "n *batch"]
    post: Float[Array, "n *batch"]
    carry: Float[Array, "n n *batch"]
    """[to, from]: what each new stream takes of each old one."""


class HyperConnectionSites(nnx.Module):
    """Static weights and the projections of the dynamic ones."""

    def __init__(self, num_sublayers: int, width: int, streams: int):
        read = jax.nn.one_hot(jnp.arange(num_sublayers) % streams, streams)
        keep = jnp.broadcast_to(jnp.eye(streams), (num_sublayers, streams, streams))
        self.alpha = nnx.Param(jnp.concatenate([read[:, :, None], keep], axis=2))
        """[site, from stream, what is read and then the n new streams]"""
        self.beta = nnx.Param(jnp.ones((num_sublayers, streams)))
        self.alpha_projection = nnx.Param(jnp.zeros((num_sublayers, width, 1 + streams)))
        self.beta_projection = nnx.Param(jnp.zeros((num_sublayers, width)))
        self.alpha_gate = nnx.Param(jnp.full(num_sublayers, INITIAL_GATE))
        self.beta_gate = nnx.Param(jnp.full(num_sublayers, INITIAL_GATE))


class HyperConnections(StreamRule):
    """Starts as n equal residual streams: site l reads stream l mod n, and writes to all."""

    OPTIONS: ClassVar[tuple[str, ...]] = ("streams",)

    def init_sites(self, num_sublayers: int, width: int) -> nnx.Module:
        """The paper's start: no dynamic part, and a static part that is the residual baseline."""
        return HyperConnectionSites(num_sublayers, width, self.options.streams)

    def mixing(self, sites: Any, site: int | Int[Array, ""], streams: Float[Array, "n *batch D"]) -> Mixing:
        """The weights of the sublayer at `site`."""
        states = wide(streams)
        states = states * jax.lax.rsqrt(jnp.mean(states**2, axis=-1, keepdims=True) + self.eps)
        alpha = jnp.einsum("n...d,dk->nk...", states, sites.alpha_projection[site], precision=HIGHEST)
        beta = jnp.einsum("n...d,d->n...", states, sites.beta_projection[site], precision=HIGHEST)
        alpha = _over(sites.alpha[site], states[0]) + sites.alpha_gate[site] * jnp.tanh(alpha)
        beta = _over(sites.beta[site], states[0]) + sites.beta_gate[site] * jnp.tanh(beta)
        return Mixing(alpha[:, 0], beta, jnp.swapaxes(alpha[:, 1:], 0, 1))

    def begin(self, sites: Any, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block: the embedding in every stream."""
        return jnp.broadcast_to(embedding, (self.options.streams, *embedding.shape)), None

    def step(self, sites: Any, site: int | Int[Array, ""], stream: Float[Array, "n *batch D"], sublayer: Sublayer):
        """Reads, runs the sublayer, mixes the streams and writes. Sums over streams are unrolled, so that XLA fuses."""
        pre, post, carry = self.mixing(sites, site, stream)
        h = _weigh(pre, stream).astype(stream.dtype)
        y = wide(sublayer(h))
        new = [_weigh(row, stream) + weight[..., None] * y for row, weight in zip(carry, post, strict=True)]
        return jnp.stack(new).astype(stream.dtype)

    def readout(
        self, sites: Any, stream: Float[Array, "n *batch D"], newest: None, bank: None
    ) -> Float[Array, "*batch D"]:
        """The sum of the streams."""
        return wide(stream).sum(0).astype(stream.dtype)

    def plain(self, sites: Any, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop; a state is the sum of the streams."""
        plain, streams = Plain([], [], [], None, []), jnp.stack([embedding] * self.options.streams)
        held = jnp.ones((self.options.streams, 1, *embedding.shape[:-1]), wide(embedding).dtype)  # of each source
        for site, sublayer in enumerate(sublayers):
            pre, post, carry = self.mixing(sites, site, streams)
            h = jnp.einsum("n...,n...d->...d", pre, wide(streams), precision=HIGHEST).astype(embedding.dtype)
            y = sublayer(h)
            plain.inputs.append(h)
            plain.matrix.append(jnp.einsum("n...,ns...->s...", pre, held, precision=HIGHEST))
            plain.outputs.append(y)
            kept = jnp.einsum("mn...,n...d->m...d", carry, wide(streams), precision=HIGHEST)
            streams = (kept + jnp.einsum("m...,...d->m...d", post, wide(y))).astype(embedding.dtype)
            held = jnp.einsum("mn...,ns...->ms...", carry, held, precision=HIGHEST)
            held = jnp.concatenate([held, post[:, None]], axis=1)
            plain.states.append(self.readout(sites, streams, None, None))
        plain.inputs.append(self.readout(sites, streams, None, None))
        plain.matrix.append(held.sum(0))
        return plain

    def flops(self, num_sublayers: int, width: int) -> int:
        """Of all sublayers: the projections that decide the weights, and reading, mixing and writing the streams."""
        n = self.options.streams
        return num_sublayers * 2 * width * (n * self.num_logits() + n + n * n + n)

    def num_logits(self) -> int:
        """Outputs of the projections of one stream."""
        return 2 + self.options.streams


def _weigh(weights: Float[Array, "n *batch"], streams: Float[Array, "n *batch D"]) -> Float[Array, "*batch D"]:
    return sum(weight[..., None] * wide(stream) for weight, stream in zip(weights, streams, strict=True))


def _over(weights: Float[Array, "*weights"], state: Float[Array, "*batch D"]) -> Float[Array, "*weights_batch"]:
    """Static weights with axes of length one for the batch."""
    return weights.reshape(*weights.shape, *[1] * (state.ndim - 1))
