"""A pipeline's schedule as rows by tick: where in its stores a stage keeps everything, and when what is sent."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax.config import Config
from attnres_jax.models import plan_of, rule_of
from attnres_jax.parallel.schedules import IDLE, Schedule, make_schedule, places
from attnres_jax.parallel.stages import Chunk, cut_chunks
from attnres_jax.parallel.transport import Pattern, patterns, windows


@dataclasses.dataclass(frozen=True)
class Ticks:
    """A schedule as the scan over its ticks reads it.

    Attributes:
      spans: [C, 2], as `windows` returns them.
      rows: arrays [ticks, P] of what each stage does, and arrays [ticks] of what all do together.
      sizes: how many places each store needs.
      sends: the patterns of sends, by whether they are backward.
    """

    spans: np.ndarray
    rows: dict[str, np.ndarray]
    sizes: dict[str, int]
    sends: dict[bool, list[Pattern]]


def make_ticks(schedule: Schedule, chunks: Sequence[Chunk], transport: str, *, has_stream: bool) -> Ticks:
    """Where in the stores everything is kept, and when what is sent.

    Args:
      schedule: of the pipeline.
      chunks: as many as it has.
      transport: of `TRANSPORTS`.
      has_stream: whether the depth rule has a stream, which comes with every hop.
    """
    stages, count, micros = schedule.stages, schedule.chunks, schedule.microbatches
    forward, backward = schedule.times(schedule.forward), schedule.times(schedule.backward)
    spans = windows(chunks, stages, transport)
    streams = [has_stream or chunk.opened for chunk in chunks]
    begins, turned = forward[:, 0].tolist(), forward[:, -1].tolist()
    returned, ends = backward[:, -1].tolist(), backward[:, 0].tolist()
    bank = places(list(zip(begins, ends, strict=True)))
    back = places(list(zip(turned, returned, strict=True)))
    kept = np.zeros((micros, count), np.int32)
    for stage in range(stages):
        units = [(m, c) for m in range(micros) for c in range(stage, count, stages)]
        for unit, place in zip(units, places([(int(forward[u]), int(backward[u])) for u in units]), strict=True):
            kept[unit] = place

    def by_stage(table: np.ndarray, value: Callable[[int, int], int]) -> np.ndarray:
        where = np.argwhere(table[..., 0] != IDLE)
        return _table((((t, r), value(*table[t, r])) for t, r in where), (schedule.ticks, stages))

    def by_tick(times: Sequence[int], value: Callable[[int], int]) -> np.ndarray:
        return _table((((tick,), value(m)) for m, tick in enumerate(times)), (schedule.ticks,))

    rows, sends = {}, {}
    for name, table in (("forward", schedule.forward), ("backward", schedule.backward)):
        rows[f"{name}.micro"] = by_stage(table, lambda m, c: m)
        rows[f"{name}.chunk"] = by_stage(table, lambda m, c: c)
        rows[f"{name}.work"] = by_stage(table, lambda m, c: chunks[c].structure)
        rows[f"{name}.bank"] = by_stage(table, lambda m, c: bank[m])
        rows[f"{name}.stream"] = by_stage(table, lambda m, c: kept[m, c])
        options, rows[f"{name}.send"] = patterns(schedule, spans, streams, backward=name == "backward")
        sends[name == "backward"] = options
    rows["backward.turned"] = by_stage(schedule.backward, lambda m, c: back[m])
    rows["embed.micro"], rows["embed.bank"] = by_tick(begins, lambda m: m), by_tick(begins, lambda m: bank[m])
    rows["head.micro"], rows["head.turned"] = by_tick(turned, lambda m: m), by_tick(turned, lambda m: back[m])
    rows["end.micro"], rows["end.bank"] = by_tick(ends, lambda m: m), by_tick(ends, lambda m: bank[m])
    stores = {"bank": bank, "turned": back, "streams": kept.ravel().tolist()}
    return Ticks(spans, rows, {name: max(used) + 1 for name, used in stores.items()}, sends)


def pipeline_ticks(config: Config, *, backward: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each tick the chunk [ticks, P] that every stage runs, and which of the patterns of sends [ticks] follows."""
    stages, pipeline = config.mesh.stage, config.pipeline
    schedule = make_schedule(pipeline.schedule, stages, pipeline.virtual_stages, config.training.accumulation)
    rule, plan, width = rule_of(config.model), plan_of(config.model), config.model.width
    stream, _ = jax.eval_shape(lambda: rule.begin(rule.init_sites(len(plan), width), jnp.zeros((1, 1, width))))
    chunks = cut_chunks(plan, rule, schedule.chunks)
    ticks = make_ticks(schedule, chunks, pipeline.transport, has_stream=stream is not None)
    name = "backward" if backward else "forward"
    return ticks.rows[f"{name}.chunk"], ticks.rows[f"{name}.send"]


def _table(entries: Iterable[tuple[tuple[int, ...], int]], shape: tuple[int, ...]) -> np.ndarray:
    """A table of `IDLE` with the given entries."""
    table = np.full(shape, IDLE, np.int32)
    for where, value in entries:
        table[where] = value
    return table
