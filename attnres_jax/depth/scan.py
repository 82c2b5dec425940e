"""The append-only depth scan: blocks that read a growing bank, run as one loop whose memory is linear in depth.

A bank in the carry of an ordinary differentiated scan is saved once per block, which is quadratic in depth. But a bank
is only ever appended to, so what block n read is a prefix of what the last block leaves behind. The backward pass here
keeps the final bank alone, reads each block's prefix from it again, and adds up the bank's cotangent in place. It is
written by hand, so that there is no forward mode (`jax.jvp`).

The newest source is beside the bank until the next block begins: no block reads what the last one leaves, so that it
needs no slot, nor a cotangent of one. Only where a stack is run in parts the bank has room for all sources, and each is
there as soon as its block ends.

Parameters stay in one stack per kind of sublayer, in layer order, whatever the blocks are: a block takes its sublayers
from the stacks by index, and their gradients go back to the same places.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.depth.operator import slot_at

_BANK_POLICY = jax.checkpoint_policies.save_only_these_names("bank")
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _BANK_POLICY
    ),
    "full": _BANK_POLICY,
}

Sublayer = Callable[[Float[Array, "*batch D"]], Float[Array, "*batch D"]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of blocks made of the same kinds of sublayers, which share one compiled body.

    Attributes:
      kinds: for each sublayer of a block in order, the name of the stack that its parameters are in.
      slots: [blocks, sublayers of a block], the place of each in its stack.
      opened: the one block of the segment goes on from the segment before it (a pipeline's stage cut it in two).
      closed: False if it does not end here.
    """

    kinds: tuple[str, ...]
    slots: np.ndarray
    opened: bool = False
    closed: bool = True


class Window(NamedTuple):
    """The slots of a bank that hold one pass's sources, where it holds those of other passes beside them."""

    first: Int[Array, ""]
    size: int


class Place(NamedTuple):
    """Where a block, or a part of a stack, stands: its first site, and how many sources were complete before it.

    Without a window the sources begin at slot 0 of the bank and may fill it.
    """

    site: int | Int[Array, ""]
    num_valid: int | Int[Array, ""]
    num_sites: int
    window: Window | None = None

    def slot(self, source: int | Int[Array, ""]) -> int | Int[Array, ""]:
        """Where a source is in the bank."""
        return source if self.window is None else self.window.first + source


class Part(NamedTuple):
    """A part of a stack of blocks.

    Attributes:
      place: where it stands.
      starts: for each kind, where in its stack the part's sublayers begin.
      complete: whether the bank holds already what the part appends, from a pass before. Nothing is appended then, and
        where blocks recompute everything, nothing but the backward pass is left to do.
      known: what that pass returned as such, so that it is not computed again.
    """

    place: Place
    starts: Mapping[str, Int[Array, ""]]
    complete: bool
    known: PyTree = None


@runtime_checkable
class Rule(Protocol):
    """What the scan asks of a depth rule. `stream` has a fixed shape, `bank` grows; None where a rule has none."""

    windowed: bool
    """Whether it reads and writes no slots but those of `place.window`; else a bank holds a single pass's sources."""

    def read(self, sites: PyTree, bank: PyTree, place: Place) -> PyTree:
        """What the block's sites take from the first `place.num_valid` slots of the bank: the block's view."""

    def read_transpose(
        self,
        sites: PyTree,
        bank: PyTree,
        place: Place,
        view: PyTree,
        view_bar: PyTree,
        bank_bar: Float[Array, "N *batch D"] | None,
    ) -> tuple[PyTree, Float[Array, "N *batch D"] | None]:
        """The cotangents that `view_bar` sends through `read`: (that of `sites`, that of the sources plus `bank_bar`).

        Whatever a bank has beside its sources was computed from them and `sites`: its backward pass is done here, too.
        """

    def block(
        self, sites: PyTree, stream: PyTree, view: PyTree, place: Place, sublayers: Sequence[Sublayer]
    ) -> tuple[PyTree, Sequence[PyTree], Float[Array, "*batch D"] | None]:
        """Runs the block's sublayers: (the stream after it, the slots that it appends, its newest source).

        A slot is one pytree. They are in order, and the newest source comes after them.
        """

    def slot(self, sites: PyTree, source: Float[Array, "*batch D"], index: int | Int[Array, ""]) -> PyTree:
        """Source `index` as a slot of the bank. What it has beside the source is a constant to gradients."""

    def num_appended(self, num_sites: int) -> int:
        """How many sources a block of `num_sites` sublayers leaves, the newest among them."""

    def part(self, segment: Segment) -> "Rule":
        """The rule for a block that begins or ends outside of `segment`, its partial sum in the stream."""

    def enter(
        self, sites: PyTree, values: Float[Array, "N *batch D"], place: Place, known: PyTree = None
    ) -> tuple[PyTree, PyTree, int | Int[Array, ""]]:
        """From the bare sources: (parameters, bank, first site) as the part of a stack at `place` sees them.

        If what is `known` of that bank is given, it is not computed again.
        """

    def known(self, bank: PyTree, place: Place) -> PyTree:
        """What of a bank beside its sources is worth keeping until a backward pass; arrays [..., *batch]."""

    def enter_transpose(
        self, sites: PyTree, place: Place, own_bar: PyTree, bank_bar: Float[Array, "N *batch D"]
    ) -> tuple[PyTree, Float[Array, "N *batch D"]]:
        """From the cotangents of parameters and sources inside the part: (that of `sites`, that of the sources)."""

    def sources(self, bank: PyTree) -> Float[Array, "*slots_batch D"]:
        """The inverse of `enter`: a bank's bare sources, or the one of a slot.

        Also of a cotangent of the same form, so that it may drop and reshape, but not compute.
        """


def depth_scan(
    rule: Rule,
    segments: Sequence[Segment],
    call: Callable[[str, PyTree, Float[Array, "*batch D"], PyTree], tuple[Float[Array, "*batch D"], PyTree]],
    stacks: Mapping[str, PyTree],
    sites: PyTree,
    stream: PyTree,
    newest: Float[Array, "*batch D"] | None,
    context: PyTree = None,
    *,
    remat: str = "none",
    part: Part | None = None,
    sources: Float[Array, "M *batch D"] | None = None,
) -> tuple[PyTree, ...]:
    """Runs all blocks of all segments. Differentiable, in reverse mode only, in everything but `context`; of the bank,
    in its sources.

    Args:
      rule: the depth rule.
      segments: the blocks, in order.
      call: `call(kind, parameters, h, context) -> (y, report)`, one sublayer; a report is any pytree of arrays.
      stacks: for each kind, the parameters of its sublayers along a leading axis.
      sites: the rule's own parameters, whole.
      stream: the rule's state before the first block, or None.
      newest: the first source, or None.
      context: what every sublayer sees (positions, masks, ...).
      remat: what the blocks keep for the backward pass, a key of `REMAT_POLICIES`.
      part: of a stack; None: the whole. All sources are then in `sources`, `newest` is None, and the stacks come back
        too: to their cotangent, which may be of other passes, that of this pass is added in place.
      sources: of a part: those complete before it, with room for all that it appends.

    Returns:
      The stream, the newest source, the bank with all others, and for each segment the sublayers' reports, a leading
      axis for the blocks. Of a part: the stream, the sources, the reports, the stacks, and, unless it is complete, what
      is worth knowing again in its backward pass, which has no gradient.

    Raises:
      ValueError: if two sublayers share a place in a stack, so that their gradients would overwrite each other, or the
        blocks of a part have not their sublayers of a kind side by side.
    """
    used = [
        (kind, slot)
        for segment in segments
        for block in segment.slots.tolist()
        for kind, slot in zip(segment.kinds, block, strict=True)
    ]
    if len(set(used)) < len(used):
        raise ValueError(f"a sublayer's parameters are used twice: {max(used, key=used.count)}; give each its own slot")
    if part and not all(_in_order(segment) for segment in segments):
        raise ValueError("a block of a part of a stack needs its sublayers of a kind side by side in their stack")
    rules = [rule.part(segment) for segment in segments]
    appended = [part.num_appended(len(segment.kinds)) for part, segment in zip(rules, segments, strict=True)]
    # Slots that have been appended when a block ends: in the whole stack without its newest source.
    settled = appended if part else [max(count - 1, 0) for count in appended]
    total = num_appended(rule, segments)
    structures: dict[int, _Structure] = {}  # of each segment's saved values; filled while the forward pass is traced
    window = part and part.place.window
    numbers = part and (part.place.site, part.place.num_valid, window and window.first, part.starts, part.known)
    numbers = jax.tree.map(jnp.asarray, numbers)

    def place_of(numbers, num_sites: int | None = None, site=None, num_valid=None) -> Place:
        """The part's place, or that of a block of it."""
        if num_sites is None:
            site, num_valid, num_sites = *numbers[:2], part.place.num_sites
        return Place(site, num_valid, num_sites, window and Window(numbers[2], window.size))

    def places_of(numbers, site) -> list[tuple[Any, Any, Any]]:
        """For each segment: the slots of its sublayers, and each block's first site and number of complete sources."""
        places, num_valid = [], 1 if numbers is None else numbers[1]
        for segment, slots in zip(segments, appended, strict=True):
            blocks, sites = segment.slots.shape
            steps, own = np.arange(blocks, dtype=np.int32), segment.slots.astype(np.int32)
            own = own if numbers is None else own + jnp.stack([numbers[3][kind] for kind in segment.kinds])
            places.append((own, site + sites * steps, num_valid + slots * steps))
            site, num_valid = site + sites * blocks, num_valid + slots * blocks
        return places

    def forward(stacks, sites, stream, newest, sources, where, save):
        (context, numbers), site = where, 0
        if numbers is not None:
            there = numbers[1] + total if part.complete else numbers[1]
            place = place_of(numbers)._replace(num_valid=there)
            sites, bank, site = rule.enter(sites, sources, place, numbers[4])
        elif newest is None:
            bank = None
        else:
            slot = jax.eval_shape(rule.slot, sites, newest, 0)
            bank = jax.tree.map(lambda x: jnp.zeros((total, *x.shape), x.dtype), slot)
        places, entered = places_of(numbers, site), (sites, site)
        reports, saved = [], []

        for index, segment in enumerate(segments):

            def run_block(carry, at, index=index, segment=segment):
                stream, newest, bank = carry
                rule, slots, place = rules[index], at[0], place_of(numbers, len(segment.kinds), *at[1:])
                if newest is not None:
                    bank = put_slots(bank, [rule.slot(sites, newest, place.num_valid - 1)], place.num_valid - 1)
                parameters = _take(stacks, segment.kinds, slots)
                view = rule.read(sites, bank, place)
                block = _block(rule, segment, call, place, context, remat if save else "none")
                if save:
                    (stream, new, newest, report), pullback = jax.vjp(block, sites, stream, view, parameters)
                    structures[index], kept = _strip(pullback, (sites, view, parameters, context, new))
                else:
                    (stream, new, newest, report), kept = block(sites, stream, view, parameters), None
                if part and newest is not None:
                    new, newest = (*new, rule.slot(sites, newest, place.num_valid + len(new))), None
                if not (part and part.complete):
                    bank = put_slots(bank, new, place.slot(place.num_valid))
                return (stream, newest, bank), (report, kept)

            carry = stream, newest, bank
            if segment.opened or not segment.closed:  # its stream is of another kind before than after: no carry
                carry, out = run_block(carry, _only(places[index]))
                report, kept = jax.tree.map(lambda x: x[None], out)
            else:
                carry, (report, kept) = jax.lax.scan(run_block, carry, places[index])
            stream, newest, bank = carry
            reports.append(report)
            saved.append(kept)
        return (stream, newest, bank, reports), (entered, bank, saved)

    @jax.custom_vjp
    def run(stacks, sites, stream, newest, sources, where):
        return result(stacks, where, forward(stacks, sites, stream, newest, sources, where, save=False)[0])

    def result(stacks, where, out):
        if part is None:
            return out
        stream, _, bank, reports = out
        known = None if part.complete else rule.known(bank, place_of(where[1]))
        return stream, rule.sources(bank), reports, stacks, known

    def run_forward(stacks, sites, stream, newest, sources, where):
        out, saved = forward(stacks, sites, stream, newest, sources, where, save=True)
        return result(stacks, where, out), (stacks, sites, where, saved)

    def run_backward(residuals, cotangents):
        stacks, all_sites, (context, numbers), ((sites, site), bank, saved) = residuals
        places, sites_bar = places_of(numbers, site), jax.tree.map(jnp.zeros_like, sites)
        if part is None:
            stream_bar, newest_bar, bank_bar, reports_bar = cotangents
            bank_bar = rule.sources(bank_bar)
            stacks_bar, put = jax.tree.map(jnp.zeros_like, stacks), _put
        else:
            stream_bar, bank_bar, reports_bar, stacks_bar, _ = cotangents
            newest_bar, put = None, _add

        for index, segment in reversed(list(enumerate(segments))):

            def run_block(carry, at, index=index, segment=segment):
                stream_bar, newest_bar, bank_bar, new_bar, stacks_bar, sites_bar = carry
                (slots, *where), kept, report_bar = at
                rule, place = rules[index], place_of(numbers, len(segment.kinds), *where)
                parameters = _take(stacks, segment.kinds, slots)
                view = rule.read(sites, bank, place)  # of the final bank, which is not read from num_valid on
                if part and appended[index]:
                    *new_bar, newest_bar = new_bar
                new = _slots_from(place.slot(place.num_valid), len(new_bar), bank)
                pullback = structures[index].restore(kept, (sites, view, parameters, context, new))
                # From cotangents of sources to those of slots: zeros for what is beside the source.
                (slots_bar,) = jax.vjp(lambda new: [rule.sources(slot) for slot in new], new)[1](list(new_bar))
                out_bar = stream_bar, slots_bar, newest_bar, report_bar
                site_bar, stream_bar, view_bar, parameters_bar = pullback(out_bar)
                read_bar, bank_bar = rule.read_transpose(sites, bank, place, view, view_bar, bank_bar)
                sites_bar = jax.tree.map(lambda *own: sum(own), sites_bar, site_bar, read_bar)
                # Of the block before this one, and read after the update in place: a block that read its own slots at
                # its start would make XLA copy the cotangent of the bank.
                if part is None and bank is not None:
                    newest_bar = slot_at(bank_bar, place.num_valid - 1)
                new_bar = _slots_from(place.slot(place.num_valid - appended[index]), settled[index], bank_bar)
                stacks_bar = put(stacks_bar, segment.kinds, slots, parameters_bar)
                newest_bar = None if part else newest_bar
                return (stream_bar, newest_bar, bank_bar, new_bar, stacks_bar, sites_bar), None

            last = place_of(numbers, 0, 0, jnp.asarray(places[index][2][-1]))
            new_bar = _slots_from(last.slot(last.num_valid), settled[index], bank_bar)
            carry = (stream_bar, newest_bar, bank_bar, new_bar, stacks_bar, sites_bar)
            at_blocks = (places[index], saved[index], reports_bar[index])
            if segment.opened or not segment.closed:
                carry, _ = run_block(carry, _only(at_blocks))
            else:
                carry, _ = jax.lax.scan(run_block, carry, at_blocks, reverse=True)
            stream_bar, newest_bar, bank_bar, _, stacks_bar, sites_bar = carry
        if part is None:
            return stacks_bar, sites_bar, stream_bar, newest_bar, None, None
        # What was appended had taken the place of what was there.
        place, zero = place_of(numbers), jax.tree.map(lambda x: jnp.zeros_like(x[0]), bank_bar)
        bank_bar = put_slots(bank_bar, [zero] * total, place.slot(place.num_valid))
        sites_bar, bank_bar = rule.enter_transpose(all_sites, place, sites_bar, bank_bar)
        return stacks_bar, sites_bar, stream_bar, None, bank_bar, None

    run.defvjp(run_forward, run_backward)
    return run(stacks, sites, stream, newest, sources, (context, numbers))


def num_appended(rule: Rule, segments: Sequence[Segment]) -> int:
    """How many sources all blocks of the segments leave."""
    return sum(len(segment.slots) * rule.part(segment).num_appended(len(segment.kinds)) for segment in segments)


def put_slots(bank: PyTree, new: Sequence[PyTree], start: int | Int[Array, ""]) -> PyTree:
    """`bank` with those slots one after the other from `start` on."""
    for i, slot in enumerate(new):
        put = lambda b, s, i=i: jax.lax.dynamic_update_index_in_dim(b, s.astype(b.dtype), start + i, 0)  # noqa: E731
        bank = jax.tree.map(put, bank, slot)
    return bank


def kept_in_bank(source: Array) -> Array:
    """Marks what a block appends as it is: its backward pass reads it from the bank and does not compute it again."""
    return checkpoint_name(source, "bank")


def _block(rule, segment, call, place, context, remat):
    """One block as a function of everything that it is differentiated in."""
    # XLA takes a loop of a single turn apart, and then would find the forward pass in the recomputation and keep it.
    alone = len(segment.slots) == 1

    def block(sites, stream, view, parameters):
        reports = []

        def sublayer(kind, own):
            def apply(h):
                y, report = call(kind, own, h, context)
                reports.append(report)
                return y

            return apply

        sublayers = [sublayer(kind, own) for kind, own in zip(segment.kinds, parameters, strict=True)]
        return *rule.block(sites, stream, view, place, sublayers), tuple(reports)

    policy = REMAT_POLICIES[remat]
    return block if policy is None else jax.checkpoint(block, policy=policy, prevent_cse=alone)


@dataclasses.dataclass(frozen=True)
class _Structure:
    """How to put a pullback together again from what the backward pass has anyway and what was kept."""

    treedef: Any
    places: tuple[int, ...]  # of each leaf, among the known arrays and then the kept ones

    def restore(self, kept: Sequence[Array], known: PyTree) -> Callable:
        arrays = [*jax.tree.leaves(known), *kept]
        return jax.tree.unflatten(self.treedef, [arrays[place] for place in self.places])


def _strip(pullback: Callable, known: PyTree) -> tuple[_Structure, list[Array]]:
    """What of a pullback needs saving, once: not the parameters, the context, nor what is or was read of the bank."""
    arrays = jax.tree.leaves(known)
    places, kept = {id(array): place for place, array in enumerate(arrays)}, []
    leaves, treedef = jax.tree.flatten(pullback)
    for leaf in leaves:
        if id(leaf) not in places:
            places[id(leaf)] = len(arrays) + len(kept)
            kept.append(jnp.asarray(leaf))  # a constant may be no array yet
    return _Structure(treedef, tuple(places[id(leaf)] for leaf in leaves)), kept


def _in_order(segment: Segment) -> bool:
    own = [segment.slots[:, [i for i, kind in enumerate(segment.kinds) if kind == each]] for each in segment.kinds]
    return all((np.diff(slots, axis=1) == 1).all() for slots in own)


def _only(blocks: PyTree) -> PyTree:
    """Of a segment of one block that block."""
    return jax.tree.map(lambda x: jnp.asarray(x)[0], blocks)


def _slots_from(start: int | Int[Array, ""], count: int, bank: PyTree) -> tuple[PyTree, ...]:
    return tuple(slot_at(bank, start + i) for i in range(count))


def _take(stacks, kinds, slots):
    """Each sublayer's own parameters, as arrays of their own: the scan recognises them again in the backward pass."""
    return tuple(
        jax.tree.map(
            lambda stack, slot=slots[i]: jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False), stacks[kind]
        )
        for i, kind in enumerate(kinds)
    )


def _put(stacks, kinds, slots, parameters):
    for i, kind in enumerate(kinds):
        put = lambda stack, own, slot=slots[i]: jax.lax.dynamic_update_index_in_dim(stack, own, slot, 0)  # noqa: E731
        stacks = {**stacks, kind: jax.tree.map(put, stacks[kind], parameters[i])}
    return stacks


def _add(stacks, kinds, slots, parameters):
    """The same, added: for each kind at once, since XLA would copy a stack that it updates in two places."""
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]

        def put(stack, *new, start=slots[own[0]]):
            old = jax.lax.dynamic_slice_in_dim(stack, start, len(new))
            return jax.lax.dynamic_update_slice_in_dim(stack, old + jnp.stack(new), start, 0)

        stacks = {**stacks, kind: jax.tree.map(put, stacks[kind], *[parameters[i] for i in own])}
    return stacks
