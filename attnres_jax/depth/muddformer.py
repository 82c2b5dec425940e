"""`muddformer`: each site reads all earlier states by weights that its newest state decides (arXiv:2502.12170).

    X_0 = embedding,   X_{l+1} = h_l + f(h_l),   h_l = sum_{j <= l} A_lj(X_l) X_j,   A_l(x) = GELU(norm(x) W1) W2 + a_l

Dynamic dense connections in their simplest published form: one way, where MUDDFormer has four (for query, key, value
and residual of an attention layer), and here one at every sublayer, where MUDDFormer has one a transformer layer. The
norm is an RMSNorm without gain, and W1 as wide as there are sources. As published, a_l starts as the newest state alone
and W2 at zero: the residual baseline.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.bank import WholeBank
from attnres_jax.depth.operator import HIGHEST, mix, slot_at, unit_rms, wide
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Place, Sublayer


class DynamicWeights(nnx.Module):
    """A small network a site, whose K = L+1 outputs are the weights of the states; of later ones they do nothing."""

    def __init__(self, num_sublayers: int, width: int):
        states = num_sublayers + 1
        self.hidden = nnx.Param(jax.random.normal(jax.random.key(0), (states, width, states)) / width**0.5)
        self.out = nnx.Param(jnp.zeros((states, states, states)))
        self.weight = nnx.Param(jnp.eye(states))


class MUDDFormer(WholeBank):
    """Dynamic weights over every earlier state; blocks are a schedule, and change nothing but the cost."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        self.block_size = block_size
        self.eps = eps

    def init_sites(self, num_sublayers: int, width: int) -> DynamicWeights:
        """The residual baseline, with hidden layers drawn from a fixed seed."""
        return DynamicWeights(num_sublayers, width)

    def begin(self, sites: DynamicWeights, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block: the embedding is state 0."""
        return None, embedding

    def block(self, sites: DynamicWeights, stream: None, view: Array, place: Place, sublayers: Sequence[Sublayer]):
        """One site after the other; the states join the bank."""
        own: list[Array] = []
        for i, sublayer in enumerate(sublayers):
            h = self.mixed(sites, place.site + i, view, place.num_valid, own)
            own.append((h + sublayer(h)).astype(view.dtype))
        return None, tuple(own[:-1]), own[-1]

    def mixed(self, sites: DynamicWeights, site, view: Array, num_valid, own: Sequence[Array]):
        """What the site reads: the states in the bank, and those of its own block so far."""
        weights = self.weights(sites, site, own[-1] if own else slot_at(view, num_valid - 1))
        h = mix(view, weights[: len(view), None], num_valid)[0]
        for k, state in enumerate(own):
            h = h + slot_at(weights, num_valid + k)[..., None] * wide(state)
        return h.astype(view.dtype)

    def weights(self, sites: DynamicWeights, site: int | Int[Array, ""], newest: Float[Array, "*batch D"]):
        """The weights of all K states for each token, [K, *batch], float32."""
        x = unit_rms(wide(newest), self.eps)
        hidden = jnp.einsum("...d,dk->...k", x, sites.hidden[site], precision=HIGHEST)
        hidden = jax.nn.gelu(hidden, approximate=False)
        weights = jnp.einsum("...k,kn->n...", hidden, sites.out[site], precision=HIGHEST)
        return weights + sites.weight[site].reshape(-1, *[1] * (newest.ndim - 1))

    def num_appended(self, num_sites: int) -> int:
        """Every state."""
        return num_sites

    def readout(
        self, sites: DynamicWeights, stream: None, newest: Float[Array, "*batch D"], bank: Float[Array, "N *batch D"]
    ) -> Float[Array, "*batch D"]:
        """The last site, over all states."""
        return self.mixed(sites, len(bank), bank, len(bank), [newest])

    def plain(self, sites: DynamicWeights, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        plain, states = Plain([], [], [], [], []), [embedding]
        rows = [jnp.ones((1, *embedding.shape[:-1]), wide(embedding).dtype)]  # of each state in embedding and outputs
        for site in range(len(sublayers) + 1):
            weights = self.weights(sites, site, states[-1])[: site + 1]
            h = jnp.einsum("n...,n...d->...d", weights, wide(jnp.stack(states)), precision=HIGHEST)
            plain.inputs.append(h.astype(embedding.dtype))
            plain.weights.append(weights)
            padded = [jnp.pad(row, [(0, site + 1 - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows]
            plain.matrix.append(jnp.einsum("n...,ns...->s...", weights, jnp.stack(padded), precision=HIGHEST))
            if site < len(sublayers):
                plain.outputs.append(sublayers[site](plain.inputs[-1]))
                states.append((plain.inputs[-1] + plain.outputs[-1]).astype(embedding.dtype))
                plain.states.append(states[-1])
                rows.append(jnp.concatenate([plain.matrix[-1], jnp.ones_like(plain.matrix[-1][:1])]))
        return plain

    def flops(self, num_sublayers: int, width: int) -> int:
        """Both layers of the network and the mix, of all sites."""
        states = num_sublayers + 1
        return states * 2 * (width * states + states * states) + 2 * width * sum(range(1, states + 1))
