"""`mhc`: hyper-connections whose stream mixing is doubly stochastic (mHC, Xie et al. 2025, arXiv 2512.24880).

All n streams of a token, flattened and RMS-normalised, give logits beside a static bias (eqs. 7 and 8):

    pre = sigmoid(.),    post = 2 sigmoid(.),    carry = Sinkhorn(exp(.)), 20 times

The mean over streams is then neither amplified nor damped by the mixing, at any depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.hyper_connections import INITIAL_GATE, HyperConnections, Mixing
from attnres_jax.depth.operator import HIGHEST, wide
from attnres_jax.depth.options import DEFAULTS, Options

SINKHORN_STEPS = 20
UNLIKELY = -8.0  # logit at the start of what is not the identity; the paper does not say where its biases start
OWN_SHARE = 0.75  # of what a site reads at the start, from stream l mod n; the others share the rest


class ManifoldSites(nnx.Module):
    """Biases, projections and gates of the logits: n of pre, n of post, then those of carry."""

    def __init__(self, bias: Float[np.ndarray, "L K"], width: int):
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
        self.projection = nnx.Param(jnp.zeros((len(bias), width, bias.shape[1])))
        self.gate = nnx.Param(jnp.full((len(bias), 3), INITIAL_GATE))


class ManifoldHyperConnections(HyperConnections):
    """Starts as n equal residual streams. Equal shares would leave them equal for ever, so each site favours one."""

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        super().__init__(block_size, eps, options)
        if options.streams < 2:
            raise ValueError(f"streams={options.streams} leaves nothing to mix; nearest: streams=2")

    def init_sites(self, num_sublayers: int, width: int) -> ManifoldSites:
        """Shares of what is read that sum to one, weight one for what is written, nearly the identity for the rest."""
        streams, carry = self.options.streams, self.initial_carry()
        share = np.full((num_sublayers, streams), (1 - OWN_SHARE) / (streams - 1))
        share[np.arange(num_sublayers), np.arange(num_sublayers) % streams] = OWN_SHARE
        read = np.log(share / (1 - share))  # the inverse of the sigmoid
        write, carry = np.zeros_like(read), np.broadcast_to(carry, (num_sublayers, carry.size))
        return ManifoldSites(np.concatenate([read, write, carry], axis=1), streams * width)

    def initial_carry(self) -> Float[np.ndarray, " K"]:
        """The logits that `carry` starts from."""
        return np.where(np.eye(self.options.streams), 0.0, UNLIKELY).ravel()

    def num_logits(self) -> int:
        """Outputs of the projection: of pre, post and carry."""
        return 2 * self.options.streams + self.initial_carry().size

    def carry(self, logits: Float[Array, "K *batch"]) -> Float[Array, "n n *batch"]:
        """The doubly stochastic matrix of these logits."""
        n = self.options.streams
        return sinkhorn(logits.reshape(n, n, *logits.shape[1:]))

    def mixing(self, sites: Any, site: int | Int[Array, ""], streams: Float[Array, "n *batch D"]) -> Mixing:
        """The weights of the sublayer at `site`."""
        n, states = len(streams), wide(streams)
        rms = jax.lax.rsqrt(jnp.mean(states**2, axis=(0, -1)) + self.eps)  # over all n D channels, as flattened
        projection = sites.projection[site].reshape(n, states.shape[-1], -1)
        dynamic = rms * jnp.einsum("n...d,ndk->k...", states, projection, precision=HIGHEST)
        bias = sites.bias[site].reshape(-1, *[1] * (dynamic.ndim - 1))
        parts = zip(sites.gate[site], jnp.split(dynamic, (n, 2 * n)), jnp.split(bias, (n, 2 * n)), strict=True)
        pre, post, carry = (gate * part + static for gate, part, static in parts)
        return Mixing(jax.nn.sigmoid(pre), 2 * jax.nn.sigmoid(post), self.carry(carry))


@jax.checkpoint
def sinkhorn(logits: Float[Array, "n n *batch"]) -> Float[Array, "n n *batch"]:
    """exp(logits) with columns and then rows scaled to sum to one, `SINKHORN_STEPS` times (eq. 9).

    In the logarithm, where nothing overflows. The backward pass repeats the steps, as the paper's does: kept, they
    would be 40 n^2 numbers a token and sublayer.
    """

    def scale(_, logits):
        return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=0), axis=1)

    return jnp.exp(jax.lax.fori_loop(0, SINKHORN_STEPS, scale, logits))
