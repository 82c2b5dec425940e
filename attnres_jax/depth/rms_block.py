"""`rms_block`: Block AttnRes whose blocks sum RMS-normalised outputs (github.com/kimmichtank/rms-block-attnres).

A completed block is b = sum_i y_i / rms(y_i), so that no output is heard louder in it than another. The embedding, and
the partial sum that the sites inside the block read, stay raw. The released code takes complete blocks only; here a
short last block is completed like the others.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from attnres_jax.depth.block import Block
from attnres_jax.depth.operator import State, unit_rms
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.reference import Plain, plain_attention_residuals
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class RMSBlock(Block):
    """Block AttnRes with a second running sum, of the normalised outputs, which is what joins the bank."""

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        super().__init__(block_size, eps, options)
        if block_size < 2:
            raise ValueError(f"block_size={block_size} leaves rms_block nothing to sum; nearest: block_size=2")

    def block(self, sites: Sites, stream: None, view: tuple[State, ...], place: Place, sublayers: Sequence[Sublayer]):
        """Phase 2 with the raw partial sum; the source is the sum of the normalised outputs."""
        partial = sublayers[0](self.join(self.summed(self.mixed(sites, view, place, 0, ()), place.num_valid)))
        completed = unit_rms(partial, self.eps)
        for i, sublayer in enumerate(sublayers[1:], 1):
            mixed = self.mixed(sites, view, place, i, (self.split(partial),))
            y = sublayer(self.join(self.summed(mixed, place.num_valid + 1)))
            partial, completed = partial + y, completed + unit_rms(y, self.eps)
        return None, (), completed

    def plain(self, sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_attention_residuals(
            sites, embedding, sublayers, self.block_size, self.eps, self.options, normalise_outputs=True
        )
