"""`layerscale`: h_{l+1} = h_l + diag(g_l) f_l(h_l), a learned gain a channel (CaiT, arXiv 2103.17239, section 2)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.operator import wide
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.rezero import plain_scaled_outputs
from attnres_jax.depth.scan import Sublayer
from attnres_jax.depth.stream import StreamRule


class LayerScaleSites(nnx.Module):
    """One gain a sublayer and channel."""

    def __init__(self, num_sublayers: int, width: int):
        self.gain = nnx.Param(jnp.full((num_sublayers, width), initial_gain(num_sublayers)))


class LayerScale(StreamRule):
    """Starts near the identity: small gains, smaller in deeper models."""

    def init_sites(self, num_sublayers: int, width: int) -> LayerScaleSites:
        """The paper's gains."""
        return LayerScaleSites(num_sublayers, width)

    def begin(self, sites: LayerScaleSites, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block."""
        return embedding, None

    def step(self, sites: LayerScaleSites, site: int | Int[Array, ""], stream: Float[Array, "*batch D"], sublayer):
        """Adds the output, each channel times its gain."""
        return (wide(stream) + sites.gain[site] * wide(sublayer(stream))).astype(stream.dtype)

    def readout(
        self, sites: LayerScaleSites, stream: Float[Array, "*batch D"], newest: None, bank: None
    ) -> Float[Array, "*batch D"]:
        """What the output head reads."""
        return stream

    def plain(
        self, sites: LayerScaleSites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]
    ) -> Plain:
        """The rule as a plain loop; in `matrix`, an output counts with its mean gain."""
        return plain_scaled_outputs(sites.gain[...], embedding, sublayers)


def initial_gain(num_sublayers: int) -> float:
    """The paper's start by depth: 0.1 up to 18 layers of two sublayers, 1e-5 up to 24, 1e-6 beyond."""
    layers = (num_sublayers + 1) // 2
    if layers <= 18:
        return 0.1
    return 1e-5 if layers <= 24 else 1e-6
