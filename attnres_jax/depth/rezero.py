"""`rezero`: h_{l+1} = h_l + a_l f_l(h_l) with a learned scalar a_l that starts at zero (ReZero, arXiv 2003.04887)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.operator import wide
from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Sublayer
from attnres_jax.depth.stream import StreamRule


class ReZeroSites(nnx.Module):
    """One gain a sublayer."""

    def __init__(self, num_sublayers: int):
        self.gain = nnx.Param(jnp.zeros(num_sublayers))


class ReZero(StreamRule):
    """Starts as the identity: no output is heard before its gain has moved. The sublayers keep their pre-norms."""

    def init_sites(self, num_sublayers: int, width: int) -> ReZeroSites:
        """Zero gains."""
        return ReZeroSites(num_sublayers)

    def begin(self, sites: ReZeroSites, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block."""
        return embedding, None

    def step(self, sites: ReZeroSites, site: int | Int[Array, ""], stream: Float[Array, "*batch D"], sublayer):
        """Adds the output times its gain."""
        return (wide(stream) + sites.gain[site] * wide(sublayer(stream))).astype(stream.dtype)

    def readout(
        self, sites: ReZeroSites, stream: Float[Array, "*batch D"], newest: None, bank: None
    ) -> Float[Array, "*batch D"]:
        """What the output head reads."""
        return stream

    def plain(self, sites: ReZeroSites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_scaled_outputs(sites.gain[...][:, None], embedding, sublayers)


def plain_scaled_outputs(
    gains: Float[Array, "L #D"], embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]
) -> Plain:
    """Each site reads the embedding plus all earlier outputs, each times its gain: the sum as it stands."""
    plain, scaled = Plain([embedding], [], [], None, []), [wide(embedding)]
    weights = [jnp.ones((), scaled[0].dtype), *gains.mean(1)]
    for gain, sublayer in zip(gains, sublayers, strict=True):
        plain.outputs.append(sublayer(plain.inputs[-1]))
        scaled.append(gain * wide(plain.outputs[-1]))
        plain.states.append(sum(scaled).astype(embedding.dtype))
        plain.inputs.append(plain.states[-1])
    for site in range(1 + len(sublayers)):
        row = jnp.stack(weights[: 1 + site]).reshape(-1, *[1] * (embedding.ndim - 1))
        plain.matrix.append(jnp.broadcast_to(row, (1 + site, *embedding.shape[:-1])))
    return plain
