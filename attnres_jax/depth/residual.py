"""`residual`: h_{l+1} = h_l + f_l(h_l), the baseline (pre-norm residual connections)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnres_jax.depth.reference import Plain
from attnres_jax.depth.scan import Sublayer
from attnres_jax.depth.stream import StreamRule


class Residual(StreamRule):
    """The stream is the sum of the embedding and all outputs so far. No parameters."""

    def init_sites(self, num_sublayers: int, width: int) -> None:
        """No parameters."""

    def begin(self, sites: None, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block."""
        return embedding, None

    def step(self, sites: None, site: int | Int[Array, ""], stream: Float[Array, "*batch D"], sublayer: Sublayer):
        """Adds the output to the stream."""
        return stream + sublayer(stream)

    def readout(
        self, sites: None, stream: Float[Array, "*batch D"], newest: None, bank: None
    ) -> Float[Array, "*batch D"]:
        """What the output head reads."""
        return stream

    def plain(self, sites: None, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        plain = Plain([embedding], [], [], None, [])
        for sublayer in sublayers:
            plain.outputs.append(sublayer(plain.inputs[-1]))
            plain.states.append(plain.inputs[-1] + plain.outputs[-1])
            plain.inputs.append(plain.states[-1])
        dtype = jnp.promote_types(embedding.dtype, jnp.float32)
        plain.matrix.extend(jnp.ones((1 + site, *embedding.shape[:-1]), dtype) for site in range(1 + len(sublayers)))
        return plain
