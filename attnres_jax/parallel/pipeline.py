"""Training through pipeline stages: loss and gradients of all microbatches, by a schedule, in one scan over its ticks.

In every tick a stage runs one chunk forward for one microbatch and one backward for another, or skips what the schedule
gives it no work for. A backward pass repeats the chunk's forward pass under `jax.vjp`, from what the stage keeps of a
microbatch: the sources that have reached it, each once whatever the number of its chunks, and the chunk's stream. These
and their cotangents are carries of a scan that nobody differentiates, in places that are free again when a microbatch
is done, so that memory does not grow with the number of microbatches.

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

from attnres_jax.axes import HIDDEN, constrain
from attnres_jax.config import PipelineConfig, TrainingConfig
from attnres_jax.depth import depth_scan
from attnres_jax.layers import RouterReport
from attnres_jax.layers.router import weigh
from attnres_jax.models import Decoder, call_sublayer, parameter_name, reports_in_order
from attnres_jax.parallel.schedules import IDLE, Schedule, make_schedule
from attnres_jax.parallel.sharding import parameter_sharding
from attnres_jax.parallel.stages import Chunk, cut_chunks, origins, rows
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
        begun, bank = jax.eval_shape(self.rule.begin, model.sites, self.h)
        self.slots = 1 if bank is None else self.chunks[-1].num_valid + self.chunks[-1].appended
        opened = self.h if any(chunk.opened for chunk in self.chunks) else None
        self.begins, self.stream = begun is not None, begun if begun is not None else opened
        self.ticks = make_ticks(schedule, self.chunks, transport, has_stream=self.begins)
        self.most_appended = max(chunk.appended for chunk in self.chunks)
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
            "bank": self.store(self.ticks.sizes["bank"], self.slots, like=self.h),
            "bars": self.store(self.ticks.sizes["bars"], self.slots, like=self.h),
            "h_bars": self.store(self.ticks.sizes["h_bars"], like=self.h),
            "streams": self.store(self.ticks.sizes["streams"], like=self.stream),
        }
        inbox = self.store(self.width, like=self.h), self.store(like=self.stream)
        router = self.router_sums(self.schedule.virtual)
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
        bank, bars, h_bars, streams = (stores[name] for name in ("bank", "bars", "h_bars", "streams"))
        embedding, table, sites, final_norm = held
        embedding_bar, table_bar, sites_bar, final_norm_bar = held_bar
        stage = jax.lax.axis_index(AXIS)
        row = {name: value[stage] if value.ndim else value for name, value in row.items()}
        of = lambda key, micro: jax.lax.dynamic_index_in_dim(batch[key], micro, keepdims=False)  # noqa: E731
        last = len(self.chunks) - 1

        # A microbatch begins: its embedding, on every stage.
        look = lambda: look_up(embedding, of("inputs", row["embed.micro"]), AXIS)  # noqa: E731
        embedded = jax.lax.cond(row["embed.micro"] != IDLE, look, lambda: jnp.zeros(self.h.shape, self.h.dtype))
        bank = _write(bank, row["embed.bank"], (0, 1), embedded[None])

        # Forward, of what has come from the stage before.
        chunk, micro, place = row["forward.chunk"], row["forward.micro"], row["forward.bank"]
        bank = _write(bank, place, self.span(chunk), slots)
        streams = jax.tree.map(lambda store, x: _replace(store, row["forward.stream"], x), streams, stream)

        def forward(structure: Chunk) -> Any:
            context, at = self.context(batch, micro), self.of_chunk(chunk)
            run = self.chunk(structure, at, context, "none")
            values = _at(bank, place)
            values, onward, h, reports = run(self.own(stacks, chunk), sites, final_norm, values, stream)
            leaving = _take(values, self.span(chunk + 1), self.width)
            new = _take(values, self.appended(chunk), self.most_appended)
            return new, leaving, onward, h, self.weighted(structure, reports)

        work = [partial(forward, structure) for structure in self.structures]
        new, slots, stream, h, router = self.work(row["forward.work"], work)
        bank = _write(bank, place, self.appended(chunk), new)
        if router is not None:
            sums["router"] = self.add(sums["router"], router, chunk)

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
        h_bars = _replace(h_bars, row["head.h_bar"], h_bar)

        # Backward, of what has come from the stage behind.
        chunk, micro, place = row["backward.chunk"], row["backward.micro"], row["backward.bars"]

        def backward(structure: Chunk) -> Any:
            context, at = self.context(batch, micro), self.of_chunk(chunk)
            run = self.chunk(structure, at, context, self.config.remat)
            kept = jax.tree.map(lambda store: _at(store, row["backward.stream"]), streams)
            values = _at(bank, row["backward.bank"])
            (_, _, _, reports), pullback = jax.vjp(run, self.own(stacks, chunk), sites, final_norm, values, kept)
            is_new = chunk >= len(self.chunks) - self.schedule.stages  # of its microbatches the first here to come back
            values_bar = jnp.where(is_new, 0, _at(bars, place))
            arrived = self.span(chunk + 1)
            values_bar = _put(values_bar, arrived, slots_bar + _take(values_bar, arrived, self.width))
            own_h_bar = jnp.where(chunk == last, _at(h_bars, row["backward.h_bar"]), 0)
            share = jnp.sum(of("weights", micro)) / total_weight
            *own, values_bar, onward = pullback((values_bar, stream_bar, own_h_bar, self.reports_bar(reports, share)))
            leaving = _take(values_bar, self.span(chunk), self.width)
            return *own, _put(values_bar, self.span(chunk), jnp.zeros_like(leaving)), leaving, onward

        work = [partial(backward, structure) for structure in self.structures]
        own_bar, site_bar, norm_bar, values_bar, slots_bar, stream_bar = self.work(row["backward.work"], work)
        bars = _replace(bars, place, values_bar)
        stacks_bar = {kind: self.add(stacks_bar[kind], own_bar[kind], chunk) for kind in stacks_bar}
        busy = partial(jax.tree.map, lambda total, bar: total + jnp.where(chunk != IDLE, bar, 0))
        sites_bar, final_norm_bar = busy((sites_bar, final_norm_bar), (site_bar, norm_bar))

        # A microbatch ends: its embedding's gradient, on every stage.
        def end() -> Any:
            bar = over_stages(_at(bars, row["end.bars"])[0], AXIS)
            return look_up_transpose(embedding, of("inputs", row["end.micro"]), bar, AXIS)

        zeros = lambda: at_rest(jax.tree.map(jnp.zeros_like, embedding))  # noqa: E731
        bar = jax.lax.cond(row["end.micro"] != IDLE, end, zeros)
        embedding_bar = jax.tree.map(jnp.add, embedding_bar, bar)

        ahead, back = self.ticks.sends[False], self.ticks.sends[True]
        inbox = send(ahead, row["forward.send"], slots, stream, axis=AXIS, backward=False)
        inbox_bar = send(back, row["backward.send"], slots_bar, stream_bar, axis=AXIS, backward=True)
        stores = {"bank": bank, "bars": bars, "h_bars": h_bars, "streams": streams}
        held_bar = embedding_bar, table_bar, sites_bar, final_norm_bar
        return (stores, inbox, inbox_bar, (stacks_bar, held_bar), sums), None

    # A chunk.

    def chunk(self, structure: Chunk, at: tuple[Array, ...], context: Any, remat: str) -> Callable:
        """A chunk as a function of everything that it is differentiated in."""
        first_site, num_valid, is_first, is_last = at

        def run(stacks, sites, final_norm, values, stream):
            if self.begins:
                begun, _ = self.rule.begin(sites, values[0])
                stream = jax.tree.map(lambda begun, x: jnp.where(is_first, begun, x), begun, stream)
            own_sites, bank, site = self.rule.enter(sites, values, first_site, structure.num_sites)
            after, bank, reports = depth_scan(
                self.rule,
                structure.segments,
                call_sublayer,
                stacks,
                own_sites,
                stream if self.begins or structure.opened else None,
                bank,
                context,
                remat=remat,
                at=(jnp.asarray(site, jnp.int32), num_valid),
            )
            read = lambda: self.rule.readout(own_sites, after if self.begins else None, bank)  # noqa: E731
            nothing = lambda: jnp.zeros(self.h.shape, self.h.dtype)  # noqa: E731
            h = jax.lax.cond(is_last, lambda: final_norm(read()), nothing)
            values = values if bank is None else self.rule.sources(bank)
            after = jax.tree.map(jnp.zeros_like, stream) if after is None else after
            return values, after, h, reports

        return run

    def work(self, which: Int[Array, ""], branches: Sequence[Callable[[], Any]]) -> Any:
        """The branch of that structure, or what a stage with nothing to do comes to."""
        shapes = jax.eval_shape(branches[0])
        idle = lambda: jax.tree.map(lambda x: jnp.full(x.shape, self.bubble, x.dtype), shapes)  # noqa: E731
        return jax.lax.switch(which + 1, [idle, *branches])

    def context(self, batch: Mapping[str, Array], micro: Int[Array, ""]) -> Any:
        """What the sublayers see of a microbatch."""
        keys = "inputs", "segment_ids", "positions"
        return self.model.context(*(jax.lax.dynamic_index_in_dim(batch[key], micro, keepdims=False) for key in keys))

    def of_chunk(self, chunk: Int[Array, ""]) -> tuple[Array, ...]:
        """What differs between chunks of one structure: first site, complete sources, whether first and last."""
        table = np.array([(c.first_site, c.num_valid) for c in self.chunks], np.int32)
        first_site, num_valid = jnp.asarray(table)[chunk]
        return first_site, num_valid, chunk == 0, chunk == len(self.chunks) - 1

    def own(self, stacks: Mapping[str, PyTree], chunk: Int[Array, ""]) -> dict[str, PyTree]:
        """A chunk's parameters, of those of the stage."""
        turn = chunk // self.schedule.stages

        def take(n: int) -> Callable:
            return lambda x: jax.lax.dynamic_slice_in_dim(x, turn * n, n)

        return {kind: jax.tree.map(take(self.counts[kind]), stack) for kind, stack in stacks.items()}

    def add(self, totals: PyTree, bars: PyTree, chunk: Int[Array, ""]) -> PyTree:
        """The transpose of `own`, added; nothing of an idle stage."""
        turn = jnp.maximum(chunk, 0) // self.schedule.stages

        def put(total: Array, bar: Array) -> Array:
            old = jax.lax.dynamic_slice_in_dim(total, turn * len(bar), len(bar))
            new = old + jnp.where(chunk != IDLE, bar, 0)
            return jax.lax.dynamic_update_slice_in_dim(total, new, turn * len(bar), 0)

        return jax.tree.map(put, totals, bars)

    def span(self, chunk: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The slots that the hop into a chunk carries, from the first to before the last."""
        known = (chunk > 0) & (chunk < len(self.chunks))
        first, last = jnp.asarray(self.ticks.spans)[jnp.where(known, chunk, 0)]
        return first, last

    def appended(self, chunk: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The slots that a chunk completes, from the first to before the last."""
        table = np.array([(c.num_valid, c.num_valid + c.appended) for c in self.chunks], np.int32)
        first, last = jnp.asarray(table)[chunk]
        return first, last

    # Routers.

    def router_sums(self, turns: int) -> RouterReport | None:
        """Zeros for the reports of so many chunks."""
        count = turns * self.counts.get("moe", 0)
        if not count:
            return None
        scalar = jnp.zeros(count)
        load = jnp.zeros((count, self.config.moe.num_experts))
        return RouterReport(**{name: load if name == "load" else scalar for name in RouterReport._fields})

    def weighted(self, structure: Chunk, reports: Any) -> RouterReport | None:
        """A chunk's reports times their numbers of tokens, zeros for layers that other chunks have more."""
        zeros, report = self.router_sums(1), reports_in_order(structure.segments, reports)
        if report is None:
            return zeros
        report = weigh(report)
        return jax.tree.map(lambda zero, own: zero.at[: len(own)].set(own), zeros, report)

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

    def store(self, *count: int, like: PyTree) -> PyTree:
        """Zeros for so many of these hidden states."""
        return jax.tree.map(lambda x: _hidden(jnp.zeros((*count, *x.shape), x.dtype)), like)


def _hidden(x: Array) -> Array:
    return constrain(x, *[None] * (x.ndim - len(HIDDEN)), *HIDDEN)


def _at(store: Array, place: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(store, place, keepdims=False)


def _replace(store: Array, place: Int[Array, ""], value: Array) -> Array:
    """`store` with the value at that place, unless it is `IDLE`."""
    place, used = jnp.maximum(place, 0), place != IDLE
    return jax.lax.dynamic_update_index_in_dim(store, jnp.where(used, value, _at(store, place)), place, 0)


def _write(store: Array, place: Int[Array, ""], slots: tuple[Any, Any], new: Array) -> Array:
    """`store` with those slots of a place replaced, from the first to before the last, unless it is `IDLE`.

    A loop, which XLA runs in place.
    """
    if not len(new):
        return store

    def put(i: Int[Array, ""], store: Array) -> Array:
        where = place, slots[0] + i, *[0] * (new.ndim - 1)
        return jax.lax.dynamic_update_slice(store, _at(new, i)[None, None], where)

    return jax.lax.fori_loop(0, jnp.where(place == IDLE, 0, slots[1] - slots[0]), put, store)


def _put(values: Array, slots: tuple[Any, Any], new: Array) -> Array:
    """`values` with those slots replaced, from the first to before the last; a loop too."""
    if not len(new):
        return values
    put = lambda i, values: jax.lax.dynamic_update_index_in_dim(values, _at(new, i), slots[0] + i, 0)  # noqa: E731
    return jax.lax.fori_loop(0, slots[1] - slots[0], put, values)


def _take(values: Array, slots: tuple[Any, Any], width: int) -> Array:
    """Those slots, and whatever is behind them, up to so many."""
    return jnp.stack([_at(values, slots[0] + i) for i in range(width)]) if width else values[:0]


def _spec(spec: PartitionSpec) -> PartitionSpec:
    """What is said in it of the stages, the only axis that is manual."""
    return PartitionSpec(*(AXIS if AXIS in (part if isinstance(part, tuple) else (part,)) else None for part in spec))


def _axis(spec: PartitionSpec) -> int:
    return list(spec).index(AXIS) if AXIS in spec else WHOLE
