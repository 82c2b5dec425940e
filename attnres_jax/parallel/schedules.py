"""Pipeline schedules: which microbatch each stage runs forward and backward in every tick, as tables.

A pipeline of P stages, each with V runs of layers (virtual stages), has C = P V chunks: chunk c = v P + r is on stage
r. In a tick a stage runs at most one chunk forward and then at most one backward, and what it makes is with its
neighbour in the next. All three schedules send microbatches through the chunks in groups of P, so that a chunk on the
last stage is followed by the next, on the first, without waiting:

    gpipe              all forward, then all backward: as many microbatches in flight as there are
    1f1b               each backward as soon as its forward is through: at most 2 P - 1 in flight
    interleaved_1f1b   the same with V > 1: bubbles shrink to those of 1/V of the layers; M is a multiple of P

A stage that is idle in a tick skips it: with F and B the time of a chunk forward and backward, each of them takes
(M V + P - 1)(F + B), of which (P - 1)(F + B) is the bubble (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from attnres_jax.config.schema import SCHEDULES

IDLE = -1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tables over ticks and stages, `IDLE` where there is nothing to do.

    Attributes:
      stages: P.
      virtual: V.
      microbatches: M.
      forward: [ticks, P, 2], the microbatch and the chunk that runs forward.
      backward: [ticks, P, 2], the same backward.
    """

    stages: int
    virtual: int
    microbatches: int
    forward: np.ndarray
    backward: np.ndarray

    @property
    def chunks(self) -> int:
        """C."""
        return self.stages * self.virtual

    @property
    def ticks(self) -> int:
        """How many there are."""
        return len(self.forward)

    def times(self, table: np.ndarray) -> np.ndarray:
        """[M, C]: the tick of every microbatch in every chunk, of `forward` or `backward`."""
        times = np.full((self.microbatches, self.chunks), IDLE)
        for tick, stage in zip(*np.nonzero(table[..., 0] != IDLE), strict=True):
            times[tuple(table[tick, stage])] = tick
        return times


def make_schedule(name: str, stages: int, virtual: int, microbatches: int) -> Schedule:
    """The schedule of that name.

    Raises:
      ValueError: beginning with `option=value`, what is allowed and the nearest that works after it.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is unknown; known: {', '.join(SCHEDULES)}")
    if name == "interleaved_1f1b" and virtual < 2:
        raise ValueError(
            f"virtual_stages={virtual} leaves interleaved_1f1b nothing to interleave; nearest: virtual_stages=2"
        )
    if name != "interleaved_1f1b" and virtual != 1:
        raise ValueError(f"virtual_stages={virtual} is for interleaved_1f1b, not {name}; nearest: virtual_stages=1")
    if virtual > 1 and microbatches % stages:
        near = -(-microbatches // stages) * stages
        raise ValueError(
            f"microbatches={microbatches} (training.accumulation) is no multiple of {stages} stages; nearest: {near}"
        )
    chunks = stages * virtual
    micro, chunk = np.meshgrid(np.arange(microbatches), np.arange(chunks), indexing="ij")
    entered = (micro // stages) * chunks + micro % stages  # when its group, and it in the group, can start
    returning = microbatches * virtual + stages - 1 if name == "gpipe" else chunks - 1
    forward, backward = entered + chunk, entered + returning + chunks - 1 - chunk
    ticks = 1 + int(backward.max())
    return Schedule(stages, virtual, microbatches, *(_table(times, ticks, stages) for times in (forward, backward)))


def places(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """For each interval of ticks, both ends included, a place of its own while it lasts; as few places as can be."""
    free_at: list[int] = []
    found = [0] * len(intervals)
    for index in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        first, last = intervals[index]
        place = next((place for place, end in enumerate(free_at) if end < first), len(free_at))
        free_at[place : place + 1] = [last]
        found[index] = place
    return found


def _table(times: np.ndarray, ticks: int, stages: int) -> np.ndarray:
    table = np.full((ticks, stages, 2), IDLE, np.int32)
    for (micro, chunk), tick in np.ndenumerate(times):
        assert table[tick, chunk % stages, 0] == IDLE  # one chunk a tick
        table[tick, chunk % stages] = micro, chunk
    return table
