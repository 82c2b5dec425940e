"""`full`: a softmax over the embedding and every earlier output (eqs. 1-4)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.depth.block import Bank, Block
from attnres_jax.depth.operator import State
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.scan import Place, Sublayer
from attnres_jax.depth.sites import Sites


class Full(Block):
    """Block AttnRes with every output a source of its own; blocks are a schedule, and change nothing but the cost."""

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        super().__init__(block_size, eps, options)
        self.source_size = 1

    def block(self, sites: Sites, stream: None, view: tuple[State, ...], place: Place, sublayers: Sequence[Sublayer]):
        """Phase 2 over the outputs of the own block, which all join the bank."""
        slots: list[Bank] = []
        own: list[Bank] = []
        scoring = self.scoring(sites, place.site, place.num_sites)
        for i, sublayer in enumerate(sublayers):
            if i:
                slots.append(self.slot(sites, newest, place.num_valid + i - 1))
                own.append(self.own_slot(scoring, slots[-1], place, i - 1))
            newest = self.join(self.run(sublayer, self.mixed(sites, view, place, i, own), place, i))
        return None, tuple(slots), newest

    def own_slot(self, scoring: PyTree, slot: Bank, place: Place, i: int) -> Bank:
        """The output of the block's sublayer `i` with the logits of the block's sites alone, differentiable again."""
        slot = slot._replace(logits=jax.lax.dynamic_slice_in_dim(slot.logits, place.site, place.num_sites))
        return slot._replace(logits=self.known_scores(scoring, slot, jnp.asarray(place.num_valid + i)))

    def known_scores(self, scoring: PyTree, slot: Bank, index: Int[Array, ""]) -> Float[Array, "S *batch"]:
        """A slot's logits as they are, with the backward pass of `scores`."""

        @jax.custom_vjp
        def known(scoring: PyTree, slot: Bank, index: Int[Array, ""]) -> Array:
            return slot.logits

        def backward(saved: tuple[PyTree, Bank, Array], logits_bar: Array) -> tuple[PyTree, Bank, None]:
            scoring, slot, index = saved
            value_bar, scoring_bar = self.scores_transpose(scoring, slot, index, logits_bar)
            return scoring_bar, jax.tree.map(jnp.zeros_like, slot)._replace(values=value_bar), None

        known.defvjp(lambda *inputs: (known(*inputs), inputs), backward)
        return known(scoring, slot, index)

    def mixed(self, sites: Sites, view: tuple[State, ...], place: Place, i: int, own: Sequence[Bank]):
        """What the block's site `i` reads: its share of the bank, and the outputs of its own block so far."""
        if not own:
            return super().mixed(sites, view, place, i, ())
        logits = jnp.stack([slot.logits[i] for slot in own])
        return self.merged(sites, view[i], [slot.values for slot in own], logits, place.site + i)

    def num_appended(self, num_sites: int) -> int:
        """Every output."""
        return num_sites

    def num_own(self, i: int) -> int:
        """Every output of the own block so far."""
        return i
