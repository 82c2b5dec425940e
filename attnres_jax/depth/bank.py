"""What rules have in common whose sites read the bank one after the other: weights that need the newest source."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.depth.scan import Place, Segment


class Bare:
    """A bank of sources and nothing beside them, whose blocks are a schedule."""

    windowed = False

    def part(self, segment: Segment) -> "Bare":
        """Any part of a block is one."""
        return self

    def enter(
        self, sites: PyTree, values: Float[Array, "N *batch D"], place: Place, known: None = None
    ) -> tuple[PyTree, Array, int | Int[Array, ""]]:
        """Parameters, sources and sites as they are."""
        return sites, values, place.site

    def enter_transpose(self, sites: PyTree, place: Place, own_bar: PyTree, bank_bar: Array):
        """As they are, too."""
        return own_bar, bank_bar

    def known(self, bank: Array, place: Place) -> None:
        """Nothing."""

    def slot(
        self, sites: PyTree, source: Float[Array, "*batch D"], index: int | Int[Array, ""]
    ) -> Float[Array, "*batch D"]:
        """The source itself."""
        return source

    def sources(self, bank: Float[Array, "*slots_batch D"]) -> Float[Array, "*slots_batch D"]:
        """The bank itself."""
        return bank


class WholeBank(Bare):
    """Sites get the bank as it is: a later one cannot read before the earlier sublayer has run, so no phase is shared.

    Every site passes over the bank by itself, and a block's backward pass holds a cotangent of the whole bank: correct
    and linear in memory, but neither as fast nor as lean as `Block`.
    """

    def read(self, sites: PyTree, bank: Float[Array, "N *batch D"], place: Place) -> Float[Array, "N *batch D"]:
        """The bank; slots from `place.num_valid` on are not to be read."""
        return bank

    def read_transpose(self, sites: PyTree, bank: Array, place: Place, view: Array, view_bar: Array, bank_bar: Array):
        """The cotangent as it is, added."""
        return jax.tree.map(jnp.zeros_like, sites), bank_bar + self.sources(view_bar)
