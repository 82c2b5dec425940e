"""A stack of layers cut into the chunks of a pipeline, and what of the stacks of parameters each chunk takes."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from attnres_jax.depth import Block, Rule, Segment, num_appended
from attnres_jax.models.plan import slots_of


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of layers.

    Attributes:
      segments: its blocks; `slots` count within the chunk, for each kind from 0.
      first_site: of its sublayers.
      num_sites: how many they are.
      num_valid: sources complete before it, the embedding among them.
      appended: sources that it completes.
      stacks: for each kind, the places of its sublayers in the stack of the whole model.
      structure: which of the structures; chunks of the same one differ in nothing but numbers.
    """

    segments: tuple[Segment, ...]
    first_site: int
    num_sites: int
    num_valid: int
    appended: int
    stacks: dict[str, list[int]]
    structure: int

    @property
    def opened(self) -> bool:
        """Whether its first block began in an earlier chunk."""
        return self.segments[0].opened


def cut_chunks(plan: Sequence[str], rule: Rule, chunks: int) -> list[Chunk]:
    """Cuts a plan of sublayers, two a layer, into equal runs of layers, the last of which may be shorter.

    Raises:
      ValueError: saying what does not fit, and the nearest that does.
    """
    layers, size = len(plan) // 2, getattr(rule, "source_size", 1)
    run = -(-layers // chunks)
    if run * (chunks - 1) >= layers:
        near = next(n for n in range(chunks, 0, -1) if -(-layers // n) * (n - 1) < layers)
        raise ValueError(f"{layers} layers in {chunks} runs of {run} leave the last without any; nearest: {near} runs")
    if size > 1 and type(rule) is not Block and 2 * run % size:
        near = min((n for n in range(1, layers + 1) if not 2 * -(-layers // n) % size), key=lambda n: abs(n - chunks))
        raise ValueError(
            f"{chunks} runs of {run} layers cut blocks of {size} sublayers, which only the rule 'block' allows; "
            f"nearest: {near} runs"
        )
    found, structures, num_valid, slots = [], {}, 1, slots_of(plan)
    for first in range(0, 2 * layers, 2 * run):
        last = min(first + 2 * run, 2 * layers)
        cuts = _cuts(first, last, size if size > 1 else rule.block_size, from_start=size > 1)
        own = [(kind, slot) for kind, slot in zip(plan[first:last], slots_of(plan[first:last]), strict=True)]
        blocks = [
            (own[a - first : b - first], size > 1 and a % size > 0, size == 1 or b % size == 0 or b == 2 * layers)
            for a, b in itertools.pairwise(cuts)
        ]
        segments = tuple(
            Segment(kinds, np.array([[slot for _, slot in block] for block, *_ in equal]), opened, closed)
            for (kinds, opened, closed), equal in itertools.groupby(
                blocks, key=lambda block: (tuple(kind for kind, _ in block[0]), *block[1:])
            )
        )
        appended = num_appended(rule, segments)
        key = tuple((s.kinds, s.opened, s.closed, len(s.slots)) for s in segments)
        stacks: dict[str, list[int]] = {}
        for kind, slot in zip(plan[first:last], slots[first:last], strict=True):
            stacks.setdefault(kind, []).append(slot)
        structure = structures.setdefault(key, len(structures))
        found.append(Chunk(segments, first, last - first, num_valid, appended, stacks, structure))
        num_valid += appended
    return found


def rows(chunks: Sequence[Chunk], stages: int, kind: str) -> np.ndarray:
    """[P, V, n]: the places in the stack of `kind` that each chunk takes, 0 beyond those that it has."""
    most = max(len(chunk.stacks.get(kind, ())) for chunk in chunks)
    table = np.zeros((len(chunks), most), np.int32)
    for index, chunk in enumerate(chunks):
        own = chunk.stacks.get(kind, [])
        table[index, : len(own)] = own
    return table.reshape(-1, stages, most).swapaxes(0, 1)


def origins(chunks: Sequence[Chunk], stages: int, kind: str) -> np.ndarray:
    """The inverse of `rows`: for each place in the stack where in the flattened [P, V, n] it is."""
    most = max(len(chunk.stacks.get(kind, ())) for chunk in chunks)
    virtual = len(chunks) // stages
    found = {}
    for index, chunk in enumerate(chunks):
        for i, slot in enumerate(chunk.stacks.get(kind, ())):
            found[slot] = ((index % stages) * virtual + index // stages) * most + i
    return np.array([found[slot] for slot in range(len(found))], np.int32)


def _cuts(first: int, last: int, size: int, *, from_start: bool) -> list[int]:
    """Where blocks begin and end between two sublayers, counted from the start of the model or from `first`."""
    origin = 0 if from_start else first
    inner = [cut for cut in range(first + 1, last) if (cut - origin) % size == 0]
    return [first, *inner, last]
