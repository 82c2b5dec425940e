"""`delta`: the residual stream, and a depth attention over the outputs added to each read (arXiv:2605.18855).

A site reads h = x + sum_i a_i y_i: x is the plain residual sum, y_i the earlier outputs and a = softmax(w . RMSNorm([0,
y_1, ...])), where the zero vector is a null source that takes weight and adds nothing. A null of zeros has the logit 0.
The authors' code also lists the embedding among the sources and can leave the null source out.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from attnres_jax.depth.block import Bank
from attnres_jax.depth.full import Full
from attnres_jax.depth.operator import State
from attnres_jax.depth.reference import Plain, plain_delta_attention_residuals
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class Delta(Full):
    """Full AttnRes with the null source in the embedding's slot, added to a residual stream."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    windowed = False

    def begin(self, sites: Sites, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block: the embedding, and the null source."""
        return embedding, jnp.zeros_like(embedding)

    def block(
        self,
        sites: Sites,
        stream: Float[Array, "*batch D"],
        view: tuple[State, ...],
        place: Place,
        sublayers: Sequence[Sublayer],
    ):
        """The block of `full` with the stream before each sublayer; each output joins the stream and the bank."""

        def beside_stream(sublayer: Sublayer) -> Sublayer:
            def apply(mixed: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
                nonlocal stream
                y = sublayer((stream + mixed).astype(stream.dtype))
                stream = stream + y
                return y

            return apply

        _, slots, newest = super().block(sites, None, view, place, [beside_stream(each) for each in sublayers])
        return stream, slots, newest

    def enter(self, sites: Sites, values: Float[Array, "N *batch D"], place: Place, known: PyTree = None):
        """As without a stream; slot 0, where the embedding comes, is the null source."""
        return super().enter(sites, values.at[0].set(0), place, known)

    def enter_transpose(self, sites: Sites, place: Place, own_bar: Sites, bank_bar: Array):
        """Nothing goes to the embedding."""
        return super().enter_transpose(sites, place, own_bar, bank_bar.at[0].set(0))

    def readout(
        self, sites: Sites, stream: Float[Array, "*batch D"], newest: Float[Array, "*batch D"], bank: Bank
    ) -> Float[Array, "*batch D"]:
        """The last site, over all outputs."""
        return stream + super().readout(sites, None, newest, bank)

    def plain(self, sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_delta_attention_residuals(sites, embedding, sublayers, self.source_size, self.eps)
