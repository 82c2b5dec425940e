"""Training through pipeline stages: loss and gradients of all microbatches, by a schedule, in one scan over its ticks.

In every tick a stage runs one chunk forward for one microbatch and one backward for another, or skips what the schedule
gives it no work for. A backward pass repeats the chunk's forward pass under `jax.vjp`, as far as it needs it, from what
the stage keeps of a microbatch: the sources that have reached it, each once whatever the number of its chunks, the
chunk's stream, and what the rule knows of the sources (`block`: their logits). These, their cotangents and the
gradients are carries of a scan that nobody differentiates, in places that are free again when a microbatch is done, so
that memory does not grow with the number of microbatches. They are large, and a chunk reads and updates them where they
lie: rules whose sites read single slots (`windowed`) get the whole store and where in it the microbatch's sources
begin, the others a copy of these.

    parameters    at rest cut in width, over `stage` as over `fsdp`, in the order of layers whatever the schedule; at
                  the start of a step an all-to-all brings each stage the layers of its chunks, at the end their
                  gradients go back
    embedding     and head are cut in the vocabulary and run on all stages at once: `vocabulary.py`
    sources       travel as `transport.py` says; the embedding is on every stage
    other axes    are the compiler's, inside of each stage

Everything is exact: the gradients are those of `jax.grad` over the same microbatches up to the order of sums.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.axes import HIDDEN, constrain, mesh_platform
from attnres_jax.config import PipelineConfig, TrainingConfig
from attnres_jax.depth import Part, Place, Window, depth_scan
from attnres_jax.depth.operator import slot_at
from attnres_jax.layers import RouterReport
from attnres_jax.layers.router import weigh
from attnres_jax.models import Decoder, call_sublayer, parameter_name, reports_in_order
from attnres_jax.parallel.schedules import IDLE, Schedule, make_schedule
from attnres_jax.parallel.sharding import parameter_sharding
from attnres_jax.parallel.stages import Chunk, cut_chunks, origins, rows
from attnres_jax.parallel.stores import (
    add_slots,
    clear_slots,
    put_corner,
    replace_slot,
    run_if,
    take_corner,
    take_slots,
    write_slots,
)
from attnres_jax.parallel.ticks import make_ticks
from attnres_jax.parallel.transport import send
from attnres_jax.parallel.vocabulary import at_rest, head, look_up, look_up_transpose, over_stages

AXIS = "stage"
WHOLE = -1


def pipeline_gradients(
    model: Decoder,
    batch: Mapping[str, Array],
    token_bytes: Array,
    total_weight: Float[Array, ""],
    training: TrainingConfig,
    pipeline: PipelineConfig,
    *,
    bubble: float = 0.0,
) -> tuple[Decoder, dict[str, Any]]:
    """The gradient of `training.loss.objective` over all microbatches, and its sums; inside `use_mesh`.

    Args:
      model: laid out as `parallel.with_shardings` says.
      batch: arrays [B, T], B of `training.accumulation` microbatches.
      token_bytes: [V], bytes of text that each token stands for.
      total_weight: of all tokens.
      training: number of microbatches, weights of the losses.
      pipeline: schedule, virtual stages, transport.
      bubble: what a stage that has nothing to do works out to. No result depends on it, even if it is NaN.

    Raises:
      ValueError: as `make_schedule` and `cut_chunks`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages = mesh.shape[AXIS]
    schedule = make_schedule(pipeline.schedule, stages, pipeline.virtual_stages, training.accumulation)
    split = {key: x.reshape(training.accumulation, -1, x.shape[-1]) for key, x in batch.items()}
    split = {key: constrain(x, None, "batch", "length") for key, x in split.items()}
    specs = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(parameter_sharding(mesh, parameter_name(path), leaf.shape).spec), model
    )
    engine = _Engine(model, specs, schedule, pipeline.transport, training, bubble, split["inputs"].shape[1:])
    run = jax.shard_map(
        engine.run,
        in_specs=(specs, PartitionSpec(), PartitionSpec(), PartitionSpec()),
        out_specs=(specs, PartitionSpec()),
        axis_names={AXIS},
        check_vma=False,
    )
    return run(model, split, token_bytes, total_weight)


class _Engine:
    """The scan over ticks on one stage, inside `shard_map`."""

    def __init__(
        self,
        model: Decoder,
        specs: Decoder,
        schedule: Schedule,
        transport: str,
        training: TrainingConfig,
        bubble: float,
        batch: tuple[int, int],
    ):
        self.model, self.schedule, self.training, self.bubble = model, schedule, training, bubble
        self.rule, self.config = model.rule(), model.config
        self.axes = jax.tree.map(_axis, dict(specs.sublayers.items()))
        self.chunks = cut_chunks(model.plan(), self.rule, schedule.chunks)
        self.h = jax.ShapeDtypeStruct((*batch, self.config.width), self.config.dtype)
        begun, newest = jax.eval_shape(self.rule.begin, model.sites, self.h)
        self.has_bank = newest is not None
        self.slots = self.chunks[-1].num_valid + self.chunks[-1].appended if self.has_bank else 1
        opened = self.h if any(chunk.opened for chunk in self.chunks) else None
        self.begins, self.stream = begun is not None, begun if begun is not None else opened
        self.ticks = make_ticks(schedule, self.chunks, transport, has_stream=self.begins)
        self.width = int(np.max(self.ticks.spans[:, 1] - self.ticks.spans[:, 0]))
        by_structure = {chunk.structure: chunk for chunk in reversed(self.chunks)}
        self.structures = [by_structure[i] for i in range(len(by_structure))]
        self.counts = {kind: max(len(chunk.stacks.get(kind, ())) for chunk in self.chunks) for kind in model.sublayers}

    def run(self, model: Decoder, batch: dict[str, Array], token_bytes: Array, total_weight: Array):
        """(gradients laid out like the model, sums): what `shard_map` calls."""
        held = model.embedding, model.head or model.embedding, model.sites, model.final_norm
        stacks = {kind: self.fetch(kind, model.sublayers[kind], self.axes[kind]) for kind in model.sublayers}
        zeros = partial(jax.tree.map, jnp.zeros_like)
        stores = {
            "bank": self.store(self.ticks.sizes["bank"] * self.slots, like=self.h),
            "bars": self.store(self.ticks.sizes["bank"] * self.slots, like=self.h),
            "turned": self.store(self.ticks.sizes["turned"], like=self.stream) if self.begins else None,
            "streams": self.store(self.ticks.sizes["streams"], like=self.stream),
            "known": self.known_store(held[2]),
        }
        inbox = self.store(self.width, like=self.h), self.store(like=self.stream)
        router = self.router_sums()
        sums = dict.fromkeys(("nll", "log_z_squared", "bytes"), jnp.float32(0)) | {"router": router}
        carry = stores, inbox, inbox, (zeros(stacks), zeros(held)), sums
        tick = partial(self.tick, stacks, held, batch, token_bytes, total_weight)
        *_, (stacks_bar, held_bar), sums = jax.lax.scan(tick, carry, self.ticks.rows)[0]

        gradients = jax.tree.map(lambda x: x, model)
        for kind, bar in stacks_bar.items():
            gradients.sublayers[kind] = self.return_to_rest(kind, bar, self.axes[kind])
        gradients.embedding, head_bar, *whole = held_bar
        if model.head:
            gradients.head = head_bar
        else:
            gradients.embedding = jax.tree.map(jnp.add, gradients.embedding, head_bar)
        gradients.sites, gradients.final_norm = jax.lax.psum(whole, AXIS)
        router = sums.pop("router")
        if router is not None:
            sums["router"] = self.return_to_rest("moe", router, jax.tree.map(lambda _: WHOLE, router))
        return gradients, sums

    def tick(self, stacks, held, batch, token_bytes, total_weight, carry, row):
        """Embedding, a chunk forward, head, a chunk backward, the embedding's gradient, sends."""
        stores, (slots, stream), (slots_bar, stream_bar), (stacks_bar, held_bar), sums = carry
        bank, bars, turned, streams, known = (stores[x] for x in ("bank", "bars", "turned", "streams", "known"))
        embedding, table, sites, final_norm = held
        embedding_bar, table_bar, sites_bar, final_norm_bar = held_bar
        stage = jax.lax.axis_index(AXIS)
        row = {name: value[stage] if value.ndim else value for name, value in row.items()}
        of = lambda key, micro: jax.lax.dynamic_index_in_dim(batch[key], micro, keepdims=False)  # noqa: E731
        last = len(self.chunks) - 1

        # A microbatch begins: its embedding, on every stage.
        begins = row["embed.micro"] != IDLE
        look = lambda: look_up(embedding, of("inputs", row["embed.micro"]), AXIS)  # noqa: E731
        embedded = jax.lax.cond(begins, look, lambda: jnp.zeros(self.h.shape, self.h.dtype))
        bank = write_slots(bank, row["embed.bank"] * self.slots, (0, begins.astype(jnp.int32)), embedded[None])

        # Forward, of what has come from the stage before.
        at = row["forward.chunk"], row["forward.micro"], row["forward.bank"] * self.slots
        chunk, _, first = at
        bank = write_slots(bank, first, self.span(chunk), slots)
        streams = jax.tree.map(lambda store, x: replace_slot(store, row["forward.stream"], x), streams, stream)

        def forward(structure: Chunk, at: tuple[Array, ...], carry: Any) -> Any:
            (chunk, micro, first), (bank, _, stream, _, router, known) = at, carry
            run = self.chunk(structure, chunk, first, self.context(batch, micro), complete=False)
            stream, values, reports, _, new = run(stacks, sites, self.values(bank, first), stream)
            known = jax.tree.map(lambda store, x: put_corner(store, row["forward.stream"], x), known, new)
            bank = self.put_values(bank, first, values, 1)  # the embedding stays as it is
            slots = take_slots(bank, first + self.span(chunk + 1)[0], self.width)
            read = lambda: self.readout(sites, final_norm, bank, first, stream)[0]  # noqa: E731
            h = jax.lax.cond(chunk == last, read, lambda: jnp.zeros(self.h.shape, self.h.dtype))
            return bank, slots, stream, h, self.add_reports(router, structure, reports, chunk), known

        nothing = jnp.zeros(self.h.shape, self.h.dtype)
        carry = self.work(row["forward.work"], forward, at, (bank, slots, stream, nothing, sums["router"], known))
        bank, slots, stream, h, sums["router"], known = self.idle(row["forward.work"], carry, (1, 2, 3))

        # A microbatch turns round: its loss, on every stage.
        def turn() -> Any:
            weights, targets = of("weights", row["head.micro"]), of("targets", row["head.micro"])
            h_whole = over_stages(jnp.where(chunk == last, h, 0), AXIS)
            result = head(table, h_whole, targets, weights / total_weight, self.training.z_loss, AXIS)
            terms = result.nll, jnp.square(result.log_z), token_bytes[targets]
            return [jnp.sum(weights * term) for term in terms], _hidden(result.h_bar), result.table_bar

        def go_on() -> Any:
            terms, h_bar, bar = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(turn))
            return terms, _hidden(h_bar), at_rest(bar)

        terms, h_bar, bar = jax.lax.cond(row["head.micro"] != IDLE, turn, go_on)
        sums |= {key: sums[key] + term for key, term in zip(("nll", "log_z_squared", "bytes"), terms, strict=True)}
        table_bar = jax.tree.map(jnp.add, table_bar, bar)

        def turn_back(reads: tuple[Array, Array], carry: Any) -> Any:
            (first, h_bar), (bars, turned, sites_bar, norm_bar) = reads, carry
            back = self.readout(sites, final_norm, bank, first, stream)[1]
            site_bar, own_bar, newest_bar, values_bar, stream_bar = back(h_bar)
            if self.has_bank:
                bars = write_slots(bars, first, (0, self.slots - 1), values_bar)
                bars = replace_slot(bars, first + self.slots - 1, newest_bar)
            put = lambda store, x: replace_slot(store, row["head.turned"], x)  # noqa: E731
            turned = jax.tree.map(put, turned, stream_bar) if self.begins else turned
            return bars, turned, *jax.tree.map(jnp.add, (sites_bar, norm_bar), (site_bar, own_bar))

        ours = (row["head.micro"] != IDLE) & (chunk == last)
        carry = run_if(ours, turn_back, (first, h_bar), (bars, turned, sites_bar, final_norm_bar))
        bars, turned, sites_bar, final_norm_bar = carry

        # Backward, of what has come from the stage behind.
        at = row["backward.chunk"], row["backward.micro"], row["backward.bank"] * self.slots

        def backward(structure: Chunk, at: tuple[Array, ...], carry: Any) -> Any:
            (chunk, micro, first), (bars, slots_bar, stream_bar, stacks_bar, sites_bar) = at, carry
            take = lambda store, x: take_corner(store, row["backward.stream"], x.shape)  # noqa: E731
            before = jax.tree.map(take, known, self.known_shapes(structure, sites))
            run = self.chunk(structure, chunk, first, self.context(batch, micro), complete=True, known=before)
            stream = jax.tree.map(lambda store: slot_at(store, row["backward.stream"]), streams)
            (*_, reports, _, _), pullback = jax.vjp(run, stacks, sites, self.values(bank, first), stream)
            kept = self.kept(chunk)
            fresh = (kept == 0) & ~((chunk == last) & self.has_bank)  # of these the head's has been put there
            bars = clear_slots(bars, first, jnp.where(fresh, self.slots, 0))
            bars = add_slots(bars, first, self.span(chunk + 1), slots_bar, kept)
            if self.begins:
                turn = lambda store, x: jnp.where(chunk == last, slot_at(store, row["backward.turned"]), x)  # noqa: E731
                stream_bar = jax.tree.map(turn, turned, stream_bar)
            share = jnp.sum(of("weights", micro)) / total_weight
            reports_bar = self.reports_bar(reports, share)
            stacks_bar, site_bar, values_bar, stream_bar = pullback(
                (stream_bar, self.values(bars, first), reports_bar, stacks_bar, None)
            )
            bars = self.put_values(bars, first, values_bar)
            slots_bar = take_slots(bars, first + self.span(chunk)[0], self.width)
            return bars, slots_bar, stream_bar, stacks_bar, jax.tree.map(jnp.add, sites_bar, site_bar)

        carry = bars, slots_bar, stream_bar, stacks_bar, sites_bar
        carry = self.work(row["backward.work"], backward, at, carry)
        bars, slots_bar, stream_bar, stacks_bar, sites_bar = self.idle(row["backward.work"], carry, (1, 2))

        # A microbatch ends: its embedding's gradient, on every stage.
        def end() -> Any:
            bar = over_stages(slot_at(bars, row["end.bank"] * self.slots), AXIS)
            return look_up_transpose(embedding, of("inputs", row["end.micro"]), bar, AXIS)

        zeros = lambda: at_rest(jax.tree.map(jnp.zeros_like, embedding))  # noqa: E731
        bar = jax.lax.cond(row["end.micro"] != IDLE, end, zeros)
        embedding_bar = jax.tree.map(jnp.add, embedding_bar, bar)

        # XLA on CPU starts conditions that do not depend on each other in any order, and devices that wait in different
        # ones for each other wait for ever. There each waits for the one before: no token is below 0, but who knows.
        def after(which: Int[Array, ""], result: PyTree) -> Int[Array, ""]:
            leaf = next((x for x in jax.tree.leaves(result) if x.size), None)
            if leaf is None or mesh_platform() != "cpu":
                return which
            bits = jax.lax.bitcast_convert_type(leaf[(0,) * leaf.ndim].astype(jnp.float32), jnp.int32)
            return which + (bits & jnp.int32(batch["inputs"][0, 0, 0] < 0))

        ahead, back = self.ticks.sends[False], self.ticks.sends[True]
        inbox = send(ahead, after(row["forward.send"], bar), slots, stream, axis=AXIS, backward=False)
        which = after(row["backward.send"], inbox)
        inbox_bar = send(back, which, slots_bar, stream_bar, axis=AXIS, backward=True)
        stores = {"bank": bank, "bars": bars, "turned": turned, "streams": streams, "known": known}
        held_bar = embedding_bar, table_bar, sites_bar, final_norm_bar
        return (stores, inbox, inbox_bar, (stacks_bar, held_bar), sums), None

    # A chunk.

    def chunk(
        self,
        structure: Chunk,
        chunk: Int[Array, ""],
        first: Int[Array, ""],
        context: Any,
        *,
        complete: bool,
        known: PyTree = None,
    ) -> Callable:
        """A chunk as a function of everything that it is differentiated in; `complete`: for the sake of that alone."""
        table = np.array([(c.first_site, c.num_valid) for c in self.chunks], np.int32)
        first_site, num_valid = jnp.asarray(table)[chunk]
        window = Window(first, self.slots) if self.rule.windowed else None
        turn = chunk // self.schedule.stages
        part = Part(
            Place(first_site, num_valid, structure.num_sites, window),
            {kind: turn * count for kind, count in self.counts.items()},
            complete,
            known,
        )

        def run(stacks, sites, values, stream):
            if self.begins:
                begun, _ = self.rule.begin(sites, values[0])
                stream = jax.tree.map(lambda begun, x: jnp.where(chunk == 0, begun, x), begun, stream)
            after, bank, *others = depth_scan(
                self.rule,
                structure.segments,
                call_sublayer,
                stacks,
                sites,
                stream if self.begins or structure.opened else None,
                None,
                context,
                remat=self.config.remat,
                part=part,
                sources=values if self.has_bank else None,
            )
            after = jax.tree.map(jnp.zeros_like, stream) if after is None else after
            return after, bank if self.has_bank else values, *others

        return run

    def readout(
        self, sites: PyTree, final_norm: Any, store: Array, first: Int[Array, ""], stream: PyTree
    ) -> tuple[Array, Callable]:
        """What the head reads of a microbatch's sources and the stream.

        And the pullback of it to parameters, norm, the newest source, the others and the stream.
        """
        place, newest, values = Place(len(self.model.plan()), self.slots - 1, 1), None, None
        if self.has_bank:
            newest, values = slot_at(store, first + self.slots - 1), self.window(store, first, self.slots - 1)
        own, bank, _ = self.rule.enter(sites, values, place)

        def read(own: PyTree, norm: Any, newest: Array | None, bank: PyTree, stream: PyTree) -> Array:
            return norm(self.rule.readout(own, stream if self.begins else None, newest, bank))

        h, pullback = jax.vjp(read, own, final_norm, newest, bank, stream)

        def back(h_bar: Array) -> Any:
            own_bar, norm_bar, newest_bar, bank_bar, stream_bar = pullback(h_bar)
            sites_bar, values_bar = self.rule.enter_transpose(sites, place, own_bar, self.rule.sources(bank_bar))
            return sites_bar, norm_bar, newest_bar, values_bar, stream_bar

        return h, back

    def values(self, store: Array, first: Int[Array, ""]) -> Array:
        """What a chunk sees of a store: all of it, or the microbatch's own sources."""
        return store if self.rule.windowed else self.window(store, first, self.slots)

    def window(self, store: Array, first: Int[Array, ""], count: int) -> Array:
        """So many of a microbatch's own sources, from its first on."""
        return jax.lax.dynamic_slice_in_dim(store, first, count)

    def put_values(self, store: Array, first: Int[Array, ""], values: Array, start: int = 0) -> Array:
        """The store after a chunk; of a microbatch's own sources those from `start` on."""
        if self.rule.windowed:
            return values
        return jax.lax.dynamic_update_slice_in_dim(store, values[start:], first + start, 0)

    def work(self, which: Int[Array, ""], body: Callable[[Chunk, Any, Any], Any], reads: PyTree, carry: Any) -> Any:
        """What becomes of `carry` under the structure of that index; a stage with nothing to do leaves it as it is.

        Loops of a turn or none, not a condition: XLA updates what a loop carries in place.
        """
        for index, structure in enumerate(self.structures):
            carry = run_if(which == index, partial(body, structure), reads, carry)
        return carry

    def idle(self, which: Int[Array, ""], carry: tuple, results: Sequence[int]) -> tuple:
        """`carry`, with `bubble` in the place of those results that nothing was worked out for."""
        if not self.bubble:
            return carry
        fill = partial(jax.tree.map, lambda x: jnp.where(which == IDLE, self.bubble, x))
        return tuple(fill(x) if index in results else x for index, x in enumerate(carry))

    def context(self, batch: Mapping[str, Array], micro: Int[Array, ""]) -> Any:
        """What the sublayers see of a microbatch."""
        keys = "inputs", "segment_ids", "positions"
        return self.model.context(*(jax.lax.dynamic_index_in_dim(batch[key], micro, keepdims=False) for key in keys))

    def span(self, chunk: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The slots that the hop into a chunk carries: the first, and one past the last; none for an idle stage."""
        known = (chunk > 0) & (chunk < len(self.chunks))
        first, last = jnp.asarray(self.ticks.spans)[jnp.where(known, chunk, 0)]
        return first, last

    def kept(self, chunk: Int[Array, ""]) -> Int[Array, ""]:
        """How many slots' cotangents a stage keeps from its last turn, the one before in going back; 0: it had none.

        Those of the other slots have gone on, and come with the next hop.
        """
        later = np.arange(len(self.chunks)) + self.schedule.stages
        spans = np.append(self.ticks.spans[:, 0], np.zeros(self.schedule.stages, np.int32))
        return jnp.asarray(spans[later])[chunk]

    # Routers.

    def router_sums(self) -> RouterReport | None:
        """Zeros for the reports of a stage's chunks."""
        count = self.schedule.virtual * self.counts.get("moe", 0)
        if not count:
            return None
        scalar = jnp.zeros(count)
        load = jnp.zeros((count, self.config.moe.num_experts))
        return RouterReport(**{name: load if name == "load" else scalar for name in RouterReport._fields})

    def add_reports(
        self, sums: RouterReport | None, structure: Chunk, reports: Any, chunk: Int[Array, ""]
    ) -> RouterReport | None:
        """A chunk's reports times their numbers of tokens, added in their places."""
        report = reports_in_order(structure.segments, reports)
        if report is None:
            return sums
        start = chunk // self.schedule.stages * self.counts["moe"]
        put = lambda sums, new: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            sums, jax.lax.dynamic_slice_in_dim(sums, start, len(new)) + new, start, 0
        )
        return jax.tree.map(put, sums, weigh(report))

    def reports_bar(self, reports: Any, share: Float[Array, ""]) -> Any:
        """The cotangent of a chunk's reports, of a microbatch with this share of the weights."""
        layers = self.model.plan().count("moe")

        def of(report: RouterReport) -> RouterReport:
            zeros = jax.tree.map(jnp.zeros_like, report)
            balance, z_loss = self.training.router_balance_loss, self.training.router_z_loss
            return zeros._replace(
                balance_loss=zeros.balance_loss + share * balance / layers,
                z_loss=zeros.z_loss + share * z_loss / layers,
            )

        is_report = lambda x: isinstance(x, RouterReport)  # noqa: E731
        return jax.tree.map(of, reports, is_leaf=is_report)

    # From the parameters at rest to what a stage works with, and back.

    def fetch(self, kind: str, stack: PyTree, axes: PyTree) -> PyTree:
        """The parameters of this stage's chunks, [V n, ...]."""
        wanted = rows(self.chunks, self.schedule.stages, kind)

        def take(x: Array, axis: int) -> Array:
            if axis == WHOLE:
                return x[jnp.asarray(wanted)[jax.lax.axis_index(AXIS)].reshape(-1)]
            return jax.lax.all_to_all(x[wanted.reshape(-1)], AXIS, 0, axis, tiled=True)

        return jax.tree.map(take, stack, axes)

    def return_to_rest(self, kind: str, bars: PyTree, axes: PyTree) -> PyTree:
        """The transpose of `fetch`, in the order of the layers."""
        where = origins(self.chunks, self.schedule.stages, kind)

        def put(x: Array, axis: int) -> Array:
            if axis == WHOLE:
                return jax.lax.all_gather(x, AXIS, tiled=True)[where]
            return jax.lax.all_to_all(x, AXIS, axis, 0, tiled=True)[where]

        return jax.tree.map(put, bars, axes)

    def known_shapes(self, structure: Chunk, sites: PyTree) -> PyTree:
        """The shapes of what a pass over a chunk knows for its backward pass."""
        if not self.has_bank:
            return None
        window = Window(jnp.int32(0), self.slots) if self.rule.windowed else None
        place = Place(jnp.int32(0), jnp.int32(1), structure.num_sites, window)
        values = jax.ShapeDtypeStruct((self.slots, *self.h.shape), self.h.dtype)
        return jax.eval_shape(lambda values: self.rule.known(self.rule.enter(sites, values, place)[1], place), values)

    def known_store(self, sites: PyTree) -> PyTree:
        """Zeros for that of each chunk that a stage has under way."""
        count = self.ticks.sizes["streams"]

        def largest(*each: Any) -> Array:
            shape = np.max([x.shape for x in each], axis=0).tolist()
            return constrain(jnp.zeros((count, *shape), each[0].dtype), *[None] * (len(shape) - 1), *HIDDEN[:-1])

        return jax.tree.map(largest, *[self.known_shapes(structure, sites) for structure in self.structures])

    def store(self, *count: int, like: PyTree) -> PyTree:
        """Zeros for so many of these hidden states."""
        return jax.tree.map(lambda x: _hidden(jnp.zeros((*count, *x.shape), x.dtype)), like)


def _hidden(x: Array) -> Array:
    return constrain(x, *[None] * (x.ndim - len(HIDDEN)), *HIDDEN)


def _spec(spec: PartitionSpec) -> PartitionSpec:
    """What is said in it of the stages, the only axis that is manual."""
    return PartitionSpec(*(AXIS if AXIS in (part if isinstance(part, tuple) else (part,)) else None for part in spec))


def _axis(spec: PartitionSpec) -> int:
    return list(spec).index(AXIS) if AXIS in spec else WHOLE
