"""`delta_block`: the `delta` rule with the sums of completed blocks as its sources (arXiv:2605.18855).

The outputs of the own block are in the residual stream and no sources of their own, so that every read of a block is
one pass over the bank, and there is no phase 2. Unlike in the authors' code, the embedding is no source.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from attnres_jax.depth.delta import Delta
from attnres_jax.depth.operator import State
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class DeltaBlock(Delta):
    """The null source, then a source a block, under attention that is added to a residual stream."""

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        super().__init__(block_size, eps, options)
        self.source_size = block_size

    def block(
        self,
        sites: Sites,
        stream: Float[Array, "*batch D"],
        view: tuple[State, ...],
        place: Place,
        sublayers: Sequence[Sublayer],
    ):
        """Each site reads the stream and its share of the bank; the sum of the outputs is the block's source."""
        total = None
        for state, sublayer in zip(view, sublayers, strict=True):
            y = sublayer((stream + state.numerator).astype(stream.dtype))
            stream, total = stream + y, y if total is None else total + y
        return stream, (), total

    def num_appended(self, num_sites: int) -> int:
        """One source a block."""
        return 1

    def num_own(self, i: int) -> int:
        """None: the own block is in the stream."""
        return 0
