"""`block`: a softmax over the embedding, the completed blocks and the own block's partial sum (eqs. 5-6)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.depth.operator import State, merge, normalise, read_bank, read_bank_transpose, reciprocal_rms
from attnres_jax.depth.reference import Plain, plain_block_attention_residuals
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class Bank(NamedTuple):
    """Completed sources and their reciprocal RMS."""

    values: Float[Array, "slots *batch D"]
    rms: Float[Array, "slots *batch"]


class Block:
    """Every `block_size` sublayers are summed into one source; the last block may be short."""

    def __init__(self, block_size: int, eps: float):
        self.block_size = block_size
        self.eps = eps

    def init_sites(self, num_sublayers: int, width: int) -> Sites:
        """Zero queries and unit key scales."""
        return Sites(num_sublayers, width)

    def begin(self, sites: Sites, embedding: Float[Array, "*batch D"]):
        """(stream, bank) before the first block: the embedding is source 0."""
        return None, self.slots(embedding[None])

    def read(self, sites: Sites, bank: Bank, place: Place) -> tuple[State, ...]:
        """Phase 1: each of the block's sites over the completed sources."""
        state = read_bank(bank.values, bank.rms, _folded(sites, place), place.num_valid)
        return tuple(state.site(i) for i in range(place.num_sites))

    def read_transpose(self, sites: Sites, bank: Bank, place: Place, view, view_bar, bank_bar: Bank):
        """The backward pass of phase 1, added into the bank's cotangent."""
        folded, unfold = jax.vjp(lambda sites: _folded(sites, place), sites)
        maximum = jnp.stack([state.maximum for state in view])
        values_bar, folded_bar = read_bank_transpose(
            bank.values, bank.rms, folded, place.num_valid, maximum, view_bar, bank_bar.values
        )
        return unfold(folded_bar)[0], Bank(values_bar, bank_bar.rms)

    def block(self, sites: Sites, stream: None, view: tuple[State, ...], place: Place, sublayers: Sequence[Sublayer]):
        """Phase 2: each site merges its share of the bank with the block's partial sum, which joins the bank."""
        partial = sublayers[0](normalise(view[0]))
        for i, sublayer in enumerate(sublayers[1:], 1):
            partial = partial + sublayer(merge(view[i], partial, *sites.at(place.site + i), eps=self.eps))
        return None, self.slots(partial[None])

    def num_appended(self, num_sites: int) -> int:
        """One source a block."""
        return 1

    def readout(self, sites: Sites, stream: None, bank: Bank) -> Float[Array, "*batch D"]:
        """The last site, over the embedding, all blocks and what was the last partial sum."""
        state = read_bank(bank.values, bank.rms, (sites.query * sites.key_scale)[-1:], len(bank.values))
        return normalise(state.site(0)).astype(bank.values.dtype)

    def plain(self, sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_block_attention_residuals(sites, embedding, sublayers, self.block_size, self.eps)

    def slots(self, values: Float[Array, "new *batch D"]) -> Bank:
        """Completed sources as slots of the bank."""
        return Bank(values, reciprocal_rms(values, self.eps))


def _folded(sites: Sites, place: Place) -> Float[Array, "S D"]:
    # Site 0 has one source, so its query changes nothing: as a constant it also gets exactly zero gradient, and no
    # rounding residue.
    folded = sites.query[...].at[0].set(0.0) * sites.key_scale[...]
    return jax.lax.dynamic_slice_in_dim(folded, place.site, place.num_sites)
