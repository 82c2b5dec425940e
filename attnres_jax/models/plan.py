"""Layer plans: which kind of sublayer stands where, cut into segments of identical blocks."""

import itertools
from collections.abc import Sequence

import numpy as np

from attnres_jax.depth import Segment


def slots_of(kinds: Sequence[str]) -> list[int]:
    """For each sublayer, its place among those of its own kind: where its parameters are in their stack."""
    seen: dict[str, int] = {}
    slots = []
    for kind in kinds:
        slots.append(seen.get(kind, 0))
        seen[kind] = slots[-1] + 1
    return slots


def cut(kinds: Sequence[str], block_size: int) -> tuple[Segment, ...]:
    """Cuts a plan of sublayers into blocks of `block_size` (the last may be short) and runs of equal blocks."""
    sublayers = list(zip(kinds, slots_of(kinds), strict=True))
    blocks = [sublayers[start : start + block_size] for start in range(0, len(sublayers), block_size)]
    segments = []
    for block_kinds, run in itertools.groupby(blocks, key=lambda block: tuple(kind for kind, _ in block)):
        segments.append(Segment(block_kinds, np.array([[slot for _, slot in block] for block in run])))
    return tuple(segments)
