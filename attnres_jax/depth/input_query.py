"""`query="input"` of `block` and `full`: queries that depend on the token (an ablation of the paper, Table 4).

The query of a site is w + W x, where x is its newest source at unit RMS. The paper projects "the current hidden state"
and says no more; here W starts at zero, so that the site starts like any other.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnres_jax.depth.bank import WholeBank
from attnres_jax.depth.block import Block
from attnres_jax.depth.operator import HIGHEST, State, mix, slot_at, unit_rms, wide
from attnres_jax.depth.options import Options
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites
from attnres_jax.depth.weighting import group_logits


class InputQuery(WholeBank, Block):
    """AttnRes with sources of `source_size` outputs and a projected query; every site passes over the bank itself."""

    def __init__(self, block_size: int, eps: float, options: Options, source_size: int):
        super().__init__(block_size, eps, options)
        self.source_size = source_size
        self.grouped = True

    def slot(self, sites: Sites, source: Float[Array, "*batch D"], index: int | Int[Array, ""]) -> Array:
        """Its channels cut into groups."""
        return self.split(source)

    def block(self, sites: Sites, stream: None, view: Array, place: Place, sublayers: Sequence[Sublayer]):
        """One site after the other; the own sources join the bank."""
        own: list[Array] = []
        for i, sublayer in enumerate(sublayers):
            y = self.run(sublayer, self.mixed(sites, view, place, i, own), place, i)
            own = [own[0] + y] if own and self.source_size > 1 else [*own, y]
        return None, tuple(own[:-1]), self.join(own[-1])

    def mixed(self, sites: Sites, view: Array, place: Place, i: int, own: Sequence[Array]):
        """What the block's site `i` reads: the bank and its own block's sources so far."""
        newest = own[-1] if own else slot_at(view, place.num_valid - 1)
        site, query = place.site + i, self.query(sites, place.site + i, newest)
        logits = self.token_logits(sites, query, view, site)
        logits = self.adjusted(sites, logits, place._replace(site=site), [len(own)])
        weights, maximum, denominator = self.weigh(logits, place.num_valid, [len(own)])
        state = State(mix(view, weights, place.num_valid), maximum, denominator).site(0)
        if not own:
            return state.numerator.astype(view.dtype)
        logits = self.token_logits(sites, query, jnp.stack(own), site)[:, 0]
        return self.merged(sites, state, own, logits, site)

    def query(self, sites: Sites, site: Int[Array, ""], newest: Float[Array, "*batch H d"]) -> Float[Array, "*batch D"]:
        """The query of each token at a site; of the first, what is projected alone (see `Block.scoring`)."""
        x = unit_rms(wide(self.join(newest)), self.eps)
        return sites.query[...].at[0].set(0.0)[site] + jnp.einsum(
            "...d,de->...e", x, sites.query_projection[site], precision=HIGHEST
        )

    def token_logits(self, sites: Sites, query: Float[Array, "*batch D"], sources: Float[Array, "K *batch H d"], site):
        """The logits of K sources at one site, [K, 1, *batch, H]."""
        scale = sites.key_scale[site][None] if self.options.key_norm else None
        return jnp.moveaxis(group_logits(sources, query[None], scale, self.eps), 0, 1)

    def num_own(self, i: int) -> int:
        """Every output of the own block so far, or their sum."""
        return i if self.source_size == 1 else min(i, 1)

    def num_appended(self, num_sites: int) -> int:
        """One source a block, or every output."""
        return num_sites if self.source_size == 1 else 1

    def readout(
        self, sites: Sites, stream: None, newest: Float[Array, "*batch D"], bank: Array
    ) -> Float[Array, "*batch D"]:
        """The last site, over all sources."""
        place = Place(jnp.int32(sites.query[...].shape[0] - 1), jnp.int32(len(bank)), 1)
        return self.join(self.summed(self.mixed(sites, bank, place, 0, [self.split(newest)]), len(bank) + 1))

    def enter(self, sites: Sites, values: Float[Array, "N *batch D"], place: Place, known: None = None):
        """Parameters and sites as they are, the sources' channels cut into groups."""
        return sites, self.split(values), place.site

    def sources(self, bank: Array) -> Float[Array, "*slots_batch D"]:
        """Channels put together again."""
        return self.join(bank)

    def flops(self, num_sublayers: int, width: int) -> int:
        """As without projection, and a D x D projection a site."""
        return super().flops(num_sublayers, width) + (num_sublayers + 1) * 2 * width**2
