"""`denseformer`: each site reads a learned static sum of the embedding and all earlier outputs (arXiv:2402.02622).

h_l = a_{l,0} x + sum_i a_{l,i} y_i, the form in which Attention Residuals compares it (Table 5); y_i is the output of a
sublayer without its residual connection. The published DenseFormer averages, once a transformer layer, the layers'
outputs X_j with their residual connections in them, and starts at X'_l = X_l. X_j = X'_{j-1} + y_j makes that a static
sum of the y_i too, and the map between the two sets of weights is invertible: the same functions under other
parameters, but here one sum for each sublayer, and an optimiser's steps differ.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnres_jax.depth.bank import Bare
from attnres_jax.depth.operator import mix, mix_transpose, wide
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Place, Sublayer


class SourceWeights(nnx.Module):
    """One weight for each site and source, at first one: the residual sum. Those of later sources have no effect."""

    def __init__(self, num_sublayers: int):
        self.weight = nnx.Param(jnp.ones((num_sublayers + 1, num_sublayers + 1)))


class DenseFormer(Bare):
    """Static weights over every earlier output; blocks are a schedule, and change nothing but the cost."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        self.block_size = block_size

    def init_sites(self, num_sublayers: int, width: int) -> SourceWeights:
        """All ones: exactly the residual baseline."""
        return SourceWeights(num_sublayers)

    def begin(self, sites: SourceWeights, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block: the embedding is source 0."""
        return None, embedding

    def read(
        self, sites: SourceWeights, bank: Float[Array, "N *batch D"], place: Place
    ) -> tuple[Float[Array, "*batch D"], ...]:
        """Each of the block's sites over the sources before the block; float32 where more is added to it."""
        first, *others = mix(bank, _weights(sites, bank, place), place.num_valid)
        return (first.astype(bank.dtype), *others)

    def read_transpose(self, sites: SourceWeights, bank, place: Place, view, view_bar, bank_bar):
        """The backward pass of `read`, added into the bank's cotangent."""
        weights, pullback = jax.vjp(lambda sites: _weights(sites, bank, place), sites)
        bank_bar, weights_bar, _ = mix_transpose(bank, weights, place.num_valid, [wide(x) for x in view_bar], bank_bar)
        return *pullback(weights_bar), bank_bar

    def block(self, sites: SourceWeights, stream: None, view, place: Place, sublayers: Sequence[Sublayer]):
        """Adds each site's share of the outputs of the own block, which all join the bank."""
        outputs = []
        for i, sublayer in enumerate(sublayers):
            h = view[i]
            for k, y in enumerate(outputs):
                h = h + wide(sites.weight[place.site + i, place.num_valid + k]) * y
            outputs.append(sublayer(h.astype(view[0].dtype)))
        return None, tuple(outputs[:-1]), outputs[-1]

    def num_appended(self, num_sites: int) -> int:
        """Every output."""
        return num_sites

    def readout(
        self, sites: SourceWeights, stream: None, newest: Float[Array, "*batch D"], bank: Float[Array, "N *batch D"]
    ) -> Float[Array, "*batch D"]:
        """The last site, over all sources."""
        place = Place(jnp.int32(len(bank)), jnp.int32(len(bank)), 1)
        mixed = mix(bank, _weights(sites, bank, place), place.num_valid)[0]
        return (mixed + wide(sites.weight[-1, len(bank)]) * newest).astype(newest.dtype)

    def plain(self, sites: SourceWeights, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        plain = Plain([], [], [], [], [])
        for site in range(len(sublayers) + 1):
            sources = [embedding, *plain.outputs]
            weights = wide(sites.weight[site, : len(sources)])
            h = sum(weight * source for weight, source in zip(weights, sources, strict=True)).astype(embedding.dtype)
            plain.inputs.append(h)
            plain.weights.append(jnp.broadcast_to(_over_batch(weights, embedding), (site + 1, *embedding.shape[:-1])))
            if site < len(sublayers):
                plain.outputs.append(sublayers[site](h))
                plain.states.append(plain.outputs[-1])
        return plain._replace(matrix=plain.weights)

    def flops(self, num_sublayers: int, width: int) -> int:
        """The mixes of all sites."""
        return 2 * width * sum(range(1, num_sublayers + 2))


def _weights(sites, bank, place) -> Float[Array, "N S *batch"]:
    rows = jax.lax.dynamic_slice_in_dim(wide(sites.weight[...]), place.site, place.num_sites)[:, : len(bank)].T
    return jnp.broadcast_to(_over_batch(rows, bank[0]), (*rows.shape, *bank.shape[1:-1]))


def _over_batch(weights, source):
    return weights.reshape(*weights.shape, *(1,) * (source.ndim - 1))
