"""What rules that keep everything in a stream of fixed size have in common: no bank, and one step a sublayer."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.scan import Place, Segment, Sublayer


class StreamRule:
    """A rule whose sublayers read and write a stream and nothing else; blocks are a schedule.

    A rule adds `init_sites`, `begin`, `step`, `readout` and `plain`.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    windowed = False

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        self.block_size = block_size
        self.eps = eps
        self.options = options

    def step(self, sites: PyTree, site: int | Int[Array, ""], stream: PyTree, sublayer: Sublayer) -> PyTree:
        """Runs the sublayer at `site`: the stream after it."""
        raise NotImplementedError

    def read(self, sites: PyTree, bank: None, place: Place) -> None:
        """The stream holds all there is to read."""

    def read_transpose(self, sites: PyTree, bank: None, place: Place, view: None, view_bar: None, bank_bar: None):
        """No bank, no cotangent."""
        return jax.tree.map(jnp.zeros_like, sites), None

    def block(self, sites: PyTree, stream: PyTree, view: None, place: Place, sublayers: Sequence[Sublayer]):
        """One step after the other."""
        for i, sublayer in enumerate(sublayers):
            stream = self.step(sites, place.site + i, stream, sublayer)
        return stream, (), None

    def slot(self, sites: PyTree, source: None, index: int | Int[Array, ""]) -> None:
        """There is no bank."""

    def num_appended(self, num_sites: int) -> int:
        """Nothing is appended."""
        return 0

    def part(self, segment: Segment) -> "StreamRule":
        """Blocks are a schedule: any part of one is one."""
        return self

    def enter(self, sites: PyTree, values: None, place: Place, known: None = None):
        """Parameters and sites as they are; there is no bank."""
        return sites, None, place.site

    def enter_transpose(self, sites: PyTree, place: Place, own_bar: PyTree, bank_bar: None):
        """As they are, too."""
        return own_bar, None

    def sources(self, bank: None) -> None:
        """None."""

    def known(self, bank: None, place: Place) -> None:
        """Nothing."""

    def flops(self, num_sublayers: int, width: int) -> int:
        """Matrix products of depth mixing, forward, in operations a token: none."""
        return 0
