"""What travels between the stages of a pipeline: sources that a stage has not got, cotangents the same way back.

    naive    with every hop all sources so far
    cached   a stage keeps what it has received, and only what it has not had in its last turn travels

With one source a chunk and the embedding apart those are the sums of Attention Residuals, equations 7 and 8:

    naive    C (C - 1) / 2          cached    P (P - 1) / 2 + (V - 1) P^2

The embedding is no part of it: all stages look it up together, see `vocabulary.py`. A hop that carries less than
another, or nothing, sends no more than that: the sends of a tick are one of few patterns, each compiled for itself.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.parallel.schedules import IDLE, Schedule
from attnres_jax.parallel.stages import Chunk

Pattern = tuple[tuple[int, bool], ...]
"""For each stage how many sources it sends in a tick, and whether its stream."""


def naive_transmissions(stages: int, virtual: int, per_chunk: float = 1.0) -> float:
    """Block representations that a microbatch's hops carry, all sources so far in each (equation 7, over d)."""
    chunks = stages * virtual
    return chunks * (chunks - 1) / 2 * per_chunk


def cached_transmissions(stages: int, virtual: int, per_chunk: float = 1.0) -> float:
    """The same where each stage keeps what it has received (equation 8, over d)."""
    return (stages * (stages - 1) / 2 + (virtual - 1) * stages**2) * per_chunk


def windows(chunks: Sequence[Chunk], stages: int, transport: str) -> np.ndarray:
    """[C, 2]: the slots of the bank, first and one past the last, that the hop into each chunk carries."""
    ends = [chunk.num_valid for chunk in chunks]
    had = lambda c: ends[c - stages] if transport == "cached" and c >= stages else 1  # noqa: E731
    return np.array([(had(c), ends[c]) if c else (1, 1) for c in range(len(chunks))], np.int32)


def patterns(
    schedule: Schedule, spans: np.ndarray, streams: Sequence[bool], *, backward: bool
) -> tuple[list[Pattern], np.ndarray]:
    """(the different patterns of sends, which of them each tick has).

    Args:
      schedule: of the pipeline.
      spans: as `windows` returns them.
      streams: for each chunk whether a stream comes with the hop into it.
      backward: the cotangents, which go against the hops.
    """
    table = schedule.backward if backward else schedule.forward
    found: dict[Pattern, int] = {}
    which = []
    for row in table[..., 1].tolist():
        into = [chunk if backward or chunk == IDLE else chunk + 1 for chunk in row]
        sends = tuple(
            (int(spans[c, 1] - spans[c, 0]), streams[c]) if 0 < c < schedule.chunks else (0, False) for c in into
        )
        which.append(found.setdefault(sends, len(found)))
    return list(found), np.array(which, np.int32)


def send(
    options: Sequence[Pattern],
    which: Int[Array, ""],
    slots: Float[Array, "W *batch D"],
    stream: PyTree,
    *,
    axis: str,
    backward: bool,
) -> tuple[Float[Array, "W *batch D"], PyTree]:
    """What each stage gets from its neighbour, zeros in the place of what is not sent.

    Args:
      options: the patterns.
      which: this tick's; the same on all stages.
      slots: the sources that this stage sends, as many as the pattern says.
      stream: what else it sends, if the pattern says so.
      axis: the mesh axis of the stages.
      backward: against the hops.
    """
    branches = [_sender(option, len(slots), axis, backward) for option in options]
    with jax.named_scope("send_back" if backward else "send_on"):  # to be found again in the compiled program
        return jax.lax.switch(which, branches, slots, stream)


def _sender(pattern: Pattern, width: int, axis: str, backward: bool) -> Any:
    stages = len(pattern)
    step = -1 if backward else 1

    def pairs(sends: Sequence[bool]) -> list[tuple[int, int]]:
        return [(stage, (stage + step) % stages) for stage in range(stages) if sends[stage]]

    # Slots with the same senders travel together.
    levels = sorted({0, width, *(count for count, _ in pattern)})
    levels = [level for level in levels if level <= width]

    def run(slots: Array, stream: PyTree) -> tuple[Array, PyTree]:
        parts = []
        for first, last in itertools.pairwise(levels):
            routes = pairs([count > first for count, _ in pattern])
            part = slots[first:last]
            parts.append(jax.lax.ppermute(part, axis, routes) if routes else jnp.zeros_like(part))
        routes = pairs([with_stream for _, with_stream in pattern])
        move = lambda x: jax.lax.ppermute(x, axis, routes) if routes else jnp.zeros_like(x)  # noqa: E731
        return (jnp.concatenate(parts) if parts else slots), jax.tree.map(move, stream)

    return run
