"""`block`: a softmax over the embedding, the completed blocks and the own block's partial sum (eqs. 5-6)."""

import copy
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.depth.operator import (
    State,
    dots,
    folded,
    logits_and_rms,
    logits_transpose,
    merge_sources,
    mix,
    mix_transpose,
    slot_at,
    wide,
)
from attnres_jax.depth.options import DEFAULTS, Options
from attnres_jax.depth.reference import Plain, plain_attention_residuals
from attnres_jax.depth.scan import Place, Segment, Sublayer, kept_in_bank, put_slots
from attnres_jax.depth.sites import Sites
from attnres_jax.depth.weighting import adjust, group_logits, merge_sigmoid, to_weights, weights_transpose


class Bank(NamedTuple):
    """Completed sources, and the logits that every site gives them: computed once, when a source is complete.

    With the reciprocal RMS that is in them, their backward pass needs no forward pass; None in other forms of logits.
    Both are constants to a gradient: what a site reads sends what they are due to the values (`Block.read_transpose`).
    The whole bank has a leading axis of slots; a single slot, without it, is a Bank too.
    """

    values: Float[Array, "*slots_batch D"]
    logits: Float[Array, "*slots_sites_batch"]
    rms: Float[Array, "*slots_batch"] | None


class Block:
    """Every `block_size` sublayers are summed into one source; the last block may be short."""

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "query",
        "weights",
        "key_norm",
        "heads",
        "window",
        "recency_bias",
        "sum_sources",
    )
    opened, closed = False, True  # see `part`
    windowed = True

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        self.block_size = block_size
        self.source_size = block_size  # outputs that are summed into one source
        self.eps = eps
        self.options = options
        # Groups of channels are one more batch axis, [*batch, heads, D / heads]; the plain form has none.
        self.grouped = options.heads > 1 or not options.key_norm

    def init_sites(self, num_sublayers: int, width: int) -> Sites:
        """Zero queries and unit key scales."""
        return Sites(num_sublayers, width, self.options, 1 + self.num_sources(num_sublayers))

    def num_sources(self, num_sublayers: int) -> int:
        """Sources beside the embedding, when all is done."""
        return -(-num_sublayers // self.source_size)

    def begin(self, sites: Sites, embedding: Float[Array, "*batch D"]):
        """(stream, newest source) before the first block: the embedding is source 0."""
        return None, embedding

    def read(self, sites: Sites, bank: Bank, place: Place) -> tuple[State, ...]:
        """Phase 1: each of the block's sites over the completed sources."""
        return self.read_bank(sites, bank, place, [self.num_own(i) for i in range(place.num_sites)])

    def read_bank(self, sites: Sites, bank: Bank, place: Place, own: Sequence[int]) -> tuple[State, ...]:
        """Phase 1 of sites with so many newer sources each in their own block."""
        logits = self.adjusted(sites, self.at_sites(bank, place).logits, place, own)
        weights, maximum, denominator = self.weigh(logits, place.num_valid, own)
        state = State(mix(bank.values, weights, place.num_valid, place.slot(0)), maximum, denominator)
        return tuple(self.finished(state.site(i), bank) if own[i] == 0 else state.site(i) for i in range(len(own)))

    def finished(self, state: State, bank: Bank) -> State:
        """Of a site that reads the bank alone: what it reads, in the dtype of the sources as at any other site."""
        return state._replace(numerator=state.numerator.astype(bank.values.dtype))

    def read_transpose(self, sites: Sites, bank: Bank, place: Place, view, view_bar, bank_bar: Array):
        """The backward pass of phase 1 and of the logits in it, added into the cotangent of the sources."""
        own = [self.num_own(i) for i in range(place.num_sites)]
        return self.read_bank_transpose(sites, bank, place, own, view, view_bar, bank_bar)

    def read_bank_transpose(self, sites, bank: Bank, place: Place, own: Sequence[int], view, view_bar, bank_bar):
        """The same, of `read_bank`; of `view`, only what sites without sources of their own have read is needed."""
        known = self.at_sites(bank, place)
        logits, unadjust = jax.vjp(lambda sites: self.adjusted(sites, known.logits, place, own), sites)
        scoring, unslice = jax.vjp(lambda sites: self.scoring(sites, place.site, place.num_sites), sites)
        weights, _, _ = self.weigh(logits, place.num_valid, own)
        # As finished arrays: the TPU compiler would fuse the first site's with the product in `offset`, and keep until
        # then what it is computed from.
        mixed_bar = jax.lax.optimization_barrier([wide(state.numerator) for state in view_bar])
        # What a softmax takes off the cotangents of all its weights; over the bank alone it follows from what was read.
        offset = jnp.stack(
            [
                -state_bar.denominator if count else dots([(bar, wide(state.numerator))])[0]
                for count, state, state_bar, bar in zip(own, view, view_bar, mixed_bar, strict=True)
            ]
        )

        def through_weights(source, value, weight_bar):
            logit_bar = weights_transpose(slot_at(weights, source), weight_bar, offset, self.options)
            slot = Bank(value, *slot_at(known[1:], source))
            return self.scores_transpose(scoring, slot, source, logit_bar)

        values_bar, weights_bar, scoring_bar = mix_transpose(
            bank.values,
            weights,
            place.num_valid,
            mixed_bar,
            bank_bar,
            place.slot(0),
            through_weights,
        )
        adjusted_bar = weights_transpose(weights, weights_bar, offset, self.options)
        sites_bar = jax.tree.map(jnp.add, *unslice(scoring_bar), *unadjust(adjusted_bar))
        return sites_bar, values_bar

    def block(
        self, sites: Sites, stream: Array | None, view: tuple[State, ...], place: Place, sublayers: Sequence[Sublayer]
    ):
        """Phase 2: each site merges its share of the bank with the block's partial sum, which is its source."""
        own = (self.split(stream),) if self.opened else ()
        for i, sublayer in enumerate(sublayers):
            y = self.run(sublayer, self.mixed(sites, view, place, i, own), place, i)
            own = (own[0] + y,) if own else (y,)
        partial = self.join(own[0])
        return (None, (), partial) if self.closed else (partial, (), None)

    def part(self, segment: Segment) -> "Block":
        """The rule for a block that begins or ends outside of the segment, its partial sum in the stream."""
        if not segment.opened and segment.closed:
            return self
        rule = copy.copy(self)
        rule.opened, rule.closed = segment.opened, segment.closed
        return rule

    def enter(self, sites: Sites, values: Float[Array, "N *batch D"], place: Place, known: PyTree = None):
        """The parameters of those sites behind a first row of zeros, and all the logits: (parameters, bank, 1).

        Row 0 is that of a site whose query changes nothing; site 0 itself has one, and its query is a zero here.
        """
        own, values = self.rows(sites, place), self.split(values)
        scoring = self.scoring(own, 0, 1 + place.num_sites)

        def fill(source: Int[Array, ""], scores: PyTree) -> PyTree:
            new = self.scores(scoring, slot_at(values, place.slot(source)), source)
            return put_slots(scores, [new], place.slot(source))

        one = jax.eval_shape(lambda: self.scores(scoring, values[0], 0))
        scores = jax.tree.map(lambda x: jnp.zeros((len(values), *x.shape), x.dtype), one)
        if known is None:
            scores = jax.lax.fori_loop(0, place.num_valid, fill, scores)
        else:
            put = lambda x, known: jax.lax.dynamic_update_slice_in_dim(x, known, place.slot(0), 0)  # noqa: E731
            scores = jax.tree.map(put, scores, known)
        return own, Bank(values, *scores), 1

    def known(self, bank: Bank, place: Place) -> PyTree:
        """The logits, where they have no axis behind the batch's, as groups of channels have."""
        if self.grouped:
            return None
        count = len(bank.values) if place.window is None else place.window.size
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place.slot(0), count), tuple(bank[1:]))

    def enter_transpose(self, sites: Sites, place: Place, own_bar: Sites, bank_bar: Array):
        """Each row goes back to its site; the sources' cotangent stays as it is."""
        return *jax.vjp(lambda sites: self.rows(sites, place), sites)[1](own_bar), bank_bar

    def rows(self, sites: Sites, place: Place) -> Sites:
        """Of the sites at `place`, and a first one of zeros."""
        own = jax.tree.map(
            lambda x: jnp.concatenate(
                [jnp.zeros_like(x[:1]), jax.lax.dynamic_slice_in_dim(x, place.site, place.num_sites)]
            ),
            sites,
        )
        if self.options.query != "none":
            inert = (jnp.arange(place.num_sites + 1) == 1) & (place.site == 0)
            own.query = own.query * jnp.where(inert, 0.0, 1.0)[:, None]
        return own

    def sources(self, bank: Bank) -> Float[Array, "*slots_batch D"]:
        """The values of a bank, or of a slot."""
        return self.join(bank.values)

    def mixed(self, sites: Sites, view: tuple[State, ...], place: Place, i: int, own: Sequence[Array]):
        """What the block's site `i` reads: its share of the bank, and its own block's sources so far."""
        if not own:
            return view[i].numerator
        return self.merged(sites, view[i], own, self.own_logits(sites, place, i, own), place.site + i)

    def own_logits(self, sites: Sites, place: Place, i: int, own: Sequence[Array]) -> Float[Array, "K *batch"]:
        """The logits of the own block's sources at its site `i`: here of the partial sum."""
        return self.scores(self.scoring(sites, place.site + i, 1), own[0], place.num_valid)[0]

    def merged(self, sites, state: State, own: Sequence[Array], logits: Float[Array, "K *batch"], site):
        """A site's share of the bank and further sources under one softmax."""
        logits = self.adjust(sites, logits[:, None], jnp.arange(len(own))[::-1, None], [False] * len(own), site)[:, 0]
        merge = merge_sources if self.options.weights == "softmax" else merge_sigmoid
        return merge(state, tuple(own), logits)

    def adjusted(self, sites: Sites, logits: Float[Array, "N S *batch"], place: Place, own: Sequence[int]):
        """The bank's logits under the options, at sites that have each `own` newer sources in their block."""
        slots = jnp.arange(len(logits))[:, None]
        return self.adjust(sites, logits, place.num_valid - 1 - slots + np.array(own), slots[:, 0] == 0, place.site)

    def weigh(self, logits: Float[Array, "N S *batch"], num_valid: int | Int[Array, ""], own: Sequence[int]):
        """(weights, maximum, denominator) of the bank at those sites.

        Where there are none, the softmax is over the bank alone and finished here: its weights sum to one.
        """
        weights, maximum, denominator = to_weights(logits, num_valid, self.options)
        alone = np.array(own).reshape(-1, *[1] * (denominator.ndim - 1)) == 0
        return weights / jnp.where(alone, denominator, 1), maximum, jnp.where(alone, 1, denominator)

    def adjust(self, sites: Sites, logits: Float[Array, "K S *batch"], ages, is_embedding, site):
        """The options that act on a logit by the place of its source; S sites from `site` on."""
        recency = None
        if self.options.recency_bias:
            recency = jax.lax.dynamic_slice_in_dim(sites.recency[...], site, logits.shape[1])
        return adjust(logits, ages, is_embedding, recency, self.options)

    def num_appended(self, num_sites: int) -> int:
        """One source a block, where it ends."""
        return int(self.closed)

    def num_own(self, i: int) -> int:
        """Sources of the own block that its site `i` reads."""
        return 1 if self.opened else min(i, 1)

    def readout(
        self, sites: Sites, stream: None, newest: Float[Array, "*batch D"], bank: Bank
    ) -> Float[Array, "*batch D"]:
        """The last site, over the embedding, all blocks and what was the last partial sum."""
        place, own = Place(bank.logits.shape[1] - 1, len(bank.values), 1), self.split(newest)

        @jax.custom_vjp  # JAX takes the bank's logits for constants: it would not find their way to sources and queries
        def read(sites: Sites, bank: Bank) -> State:
            return self.read_bank(sites, bank, place, [1])[0]

        def read_forward(sites: Sites, bank: Bank):
            return read(sites, bank), (sites, bank)

        def read_backward(saved: tuple[Sites, Bank], state_bar: State):
            sites, bank = saved
            zeros = jax.tree.map(jnp.zeros_like, bank)
            bars = self.read_bank_transpose(sites, bank, place, [1], [None], [state_bar], zeros.values)
            return bars[0], zeros._replace(values=bars[1])

        read.defvjp(read_forward, read_backward)
        logits = self.scores(self.scoring(sites, place.site, 1), own, place.num_valid)[0]
        mixed = self.merged(sites, read(sites, bank), (own,), logits, place.site)
        return self.join(self.summed(mixed, place.num_valid + 1))

    def plain(self, sites: Sites, embedding: Float[Array, "*batch D"], sublayers: Sequence[Sublayer]) -> Plain:
        """The rule as a plain loop."""
        return plain_attention_residuals(sites, embedding, sublayers, self.source_size, self.eps, self.options)

    def flops(self, num_sublayers: int, width: int) -> int:
        """Matrix products of depth mixing, forward, in operations a token: logits and mixes of all sites.

        A lone source is not mixed but counts as one.
        """
        size = self.source_size
        reads = [1 + site // size + min(self.num_own(site % size), 1) for site in range(num_sublayers)]
        reads.append(1 + self.num_sources(num_sublayers))
        if self.options.window:
            reads = [min(read, 1 + self.options.window) for read in reads]
        return (2 if self.options.query == "none" else 4) * width * sum(reads)

    def slot(self, sites: Sites, source: Float[Array, "*batch D"], index: int | Int[Array, ""]) -> Bank:
        """A completed source as slot `index` of the bank, with the logits of all sites from one matmul."""
        source = kept_in_bank(self.split(source))
        return Bank(source, *jax.lax.stop_gradient(self.scores(self.scoring(sites), source, index)))

    def scoring(self, sites: Sites, site: int | Int[Array, ""] = 0, count: int | None = None) -> PyTree:
        """What the logits of `count` sites from `site` on are computed from: of all, if there is no count."""
        take = lambda x: x if count is None else jax.lax.dynamic_slice_in_dim(x, site, count)  # noqa: E731
        if self.options.query == "none":
            return take(sites.source_logit[...])
        # Site 0 has one source, so its query changes nothing: as a constant it also gets exactly zero gradient, and no
        # rounding residue.
        queries = take(sites.query[...].at[0].set(0.0))
        if self.grouped:
            return queries, take(sites.key_scale[...]) if self.options.key_norm else None
        return folded(queries, take(sites.key_scale[...]))

    def scores(
        self, scoring: PyTree, source: Array, index: int | Int[Array, ""]
    ) -> tuple[Float[Array, "S *batch"], Float[Array, "*batch"] | None]:
        """The logits of source `index` at the sites of `scoring`, and the `rms` in them: see `Bank`."""
        if self.options.query == "none":
            column = jax.lax.dynamic_index_in_dim(scoring, index, 1, keepdims=False)
            column = column.astype(wide(source).dtype).reshape(-1, *[1] * (source.ndim - 1))
            return jnp.broadcast_to(column, (len(column), *source.shape[:-1])), None
        if self.grouped:
            return group_logits(source, *scoring, self.eps), None
        return logits_and_rms(source, scoring, self.eps)

    def scores_transpose(
        self, scoring: PyTree, slot: Bank, index: int | Int[Array, ""], logits_bar: Float[Array, "S *batch"]
    ) -> tuple[Array, PyTree]:
        """The backward pass of `scores`, from what it returned: cotangents of (the source, `scoring`)."""
        if slot.rms is None:
            score = lambda scoring, source: self.scores(scoring, source, index)[0]  # noqa: E731
            scoring_bar, value_bar = jax.vjp(score, scoring, slot.values)[1](logits_bar)
            return value_bar, scoring_bar
        return logits_transpose(slot.values, scoring, slot.rms, slot.logits, logits_bar)

    def at_sites(self, bank: Bank, place: Place) -> Bank:
        """Of the slots in `place.window` the logits at the sites of `place`; the values as they are."""
        known = bank[1:]
        if place.window is not None:
            known = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, *place.window), known)
        logits, rms = known
        return Bank(bank.values, jax.lax.dynamic_slice_in_dim(logits, place.site, place.num_sites, axis=1), rms)

    def run(self, sublayer: Sublayer, mixed: Array, place: Place, i: int) -> Array:
        """Calls a sublayer on what the block's site `i` reads."""
        return self.split(sublayer(self.join(self.summed(mixed, place.num_valid + self.num_own(i)))))

    def summed(self, mixed: Array, num_sources: int | Int[Array, ""]) -> Array:
        """The mix itself, or times the number of its sources."""
        return mixed * jnp.asarray(num_sources, mixed.dtype) if self.options.sum_sources else mixed

    def split(self, x: Array) -> Array:
        """Channels cut into groups, where there are any."""
        return x.reshape(*x.shape[:-1], self.options.heads, -1) if self.grouped else x

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        return x.reshape(*x.shape[:-2], -1) if self.grouped else x
