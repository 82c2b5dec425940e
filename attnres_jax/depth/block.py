"""`block`: a softmax over the embedding, the completed blocks and the own block's partial sum (eqs. 5-6)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.depth.operator import State, depth_logits, merge, mix_sources, mix_sources_transpose, normalise
from attnres_jax.depth.reference import Plain, plain_block_attention_residuals
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class Bank(NamedTuple):
    """Completed sources, and the logit of each at every site, computed once when the source is complete."""

    values: Float[Array, "slots *batch D"]
    logits: Float[Array, "slots sites *batch"]


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
        return None, self.slots(sites, embedding[None])

    def read(self, bank: Bank, place: Place) -> State:
        """Phase 1: the block's softmax numerators over the completed sources."""
        return mix_sources(bank.values, _logits(bank, place), place.num_valid)

    def read_transpose(self, bank: Bank, place: Place, view_bar: State, bank_bar: Bank) -> Bank:
        """The backward pass of phase 1, added into the bank's cotangent."""
        values_bar, logits_bar = mix_sources_transpose(
            bank.values, _logits(bank, place), place.num_valid, view_bar, bank_bar.values
        )
        logits_bar += _logits(bank_bar, place)
        return Bank(values_bar, jax.lax.dynamic_update_slice_in_dim(bank_bar.logits, logits_bar, place.site, 1))

    def block(self, sites: Sites, stream: None, view: State, place: Place, sublayers: Sequence[Sublayer]):
        """Phase 2: each site merges its share of the bank with the block's partial sum, which joins the bank."""
        partial = sublayers[0](normalise(view.site(0)))
        for i, sublayer in enumerate(sublayers[1:], 1):
            partial = partial + sublayer(merge(view.site(i), partial, *sites.at(place.site + i), eps=self.eps))
        return None, self.slots(sites, partial[None])

    def num_appended(self, num_sites: int) -> int:
        """One source a block."""
        return 1

    def readout(self, sites: Sites, stream: None, bank: Bank) -> Float[Array, "*batch D"]:
        """The last site, over the embedding, all blocks and what was the last partial sum."""
        state = mix_sources(bank.values, bank.logits[:, -1:], len(bank.values))
        return normalise(state.site(0)).astype(bank.values.dtype)

    def plain(self, sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_block_attention_residuals(sites, embedding, sublayers, self.block_size, self.eps)

    def slots(self, sites: Sites, values: Float[Array, "new *batch D"]) -> Bank:
        """Completed sources as slots of the bank."""
        # Site 0 has one source, so its logits change nothing: with a constant query they also carry no rounding
        # residue into its gradient, which is exactly zero.
        query = sites.query.at[0].set(0.0)
        return Bank(values, jnp.swapaxes(depth_logits(values, query, sites.key_scale[...], self.eps), 0, 1))


def _logits(bank: Bank, place: Place) -> Float[Array, "slots S *batch"]:
    return jax.lax.dynamic_slice_in_dim(bank.logits, place.site, place.num_sites, 1)
