"""What a compiled program sends between devices, by mesh axis: read from the text of its optimised HLO.

Bytes are those that one device sends when its group exchanges them around a ring: of n devices, each with an operand of
b bytes, an all-gather sends (n - 1) b, a reduce-scatter or an all-to-all (n - 1) / n b, an all-reduce 2 (n - 1) / n b,
a permutation b. Everything in the body of a loop counts as often as the loop runs, every branch of a condition once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$")
_NAMED = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_MESH_GROUP = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:, device_ids=\(?[^)]*\)?\s*)?\{([^}]*)\}")
_IOTA_GROUP = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,\s]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}\s]*\})\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes.

    Attributes:
      kind: of `KINDS`.
      axes: the mesh axes along which the devices of a group differ.
      times: how many one run of the program makes.
      sent_bytes: what one device sends in all of them.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    sent_bytes: int


class Instruction(NamedTuple):
    """A line of HLO: `%name = type opcode(operands), rest`."""

    name: str
    type: str
    opcode: str
    operands: str
    rest: str


def traffic(text: str, mesh: Mapping[str, int]) -> tuple[list[Traffic], int]:
    """The collectives of an HLO module, most bytes first, and the number of loops whose length it does not tell.

    Args:
      text: of the compiled program, after all optimisations.
      mesh: the sizes of the mesh's axes, in order; the program's devices are numbered along them.

    Returns:
      The collectives, and how many loops with collectives inside were counted as if they ran once.
    """
    computations, entry = parse(text)
    times, unknown = _executions(computations, entry)
    sums: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for name, instructions in computations.items():
        sizes = {instruction.name: type_bytes(instruction.type) for instruction in instructions}
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not times.get(name):
                continue
            if name.startswith("all-reduce-scatter"):  # a TPU's fusion of an all-reduce with the slice that is kept
                kind = "reduce-scatter"
            operand = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", instruction.operands))
            axes, members = _group(instruction.rest, mesh)
            if members > 1:
                total = sums.setdefault((kind, axes), [0, 0])
                total[0] += times[name]
                total[1] += times[name] * sent_bytes(kind, operand, members)
    rows = [Traffic(kind, axes, count, sent) for (kind, axes), (count, sent) in sums.items()]
    with_collectives = reaching(computations, lambda i: i.opcode.removesuffix("-start") in KINDS)
    return sorted(rows, key=lambda row: -row.sent_bytes), sum(body in with_collectives for body in unknown)


def sent_bytes(kind: str, operand: int, members: int) -> int:
    """What a device sends around a ring of `members`, each with an operand of so many bytes."""
    if kind == "collective-permute":
        return operand
    if kind == "all-gather":
        return operand * (members - 1)
    return (2 if kind == "all-reduce" else 1) * operand * (members - 1) // members


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation by its name, callees first as they are printed, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    current = entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (named := _NAMED.match(line)):
            end = _closing(named[2]) if named[2].startswith("(") else named[2].find(" ")
            opcode = _OPCODE.match(named[2], end)
            if opcode:
                closing = _closing(named[2], opcode.end() - 1)
                operands, rest = named[2][opcode.end() : closing - 1], named[2][closing:]
                computations[current].append(Instruction(named[1], named[2][:end], opcode[1], operands, rest))
    return computations, entry


def type_bytes(text: str) -> int:
    """Of an array type or of all arrays of a tuple type, without padding."""
    total = 0
    for dtype, lengths in _ARRAY.findall(text):
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = 8 if dtype == "pred" else int(digits[1]) if digits else 0
        total += math.prod(int(length) for length in lengths.split(",") if length) * bits // 8
    return total


def _executions(computations: Mapping[str, list[Instruction]], entry: str) -> tuple[dict[str, int], list[str]]:
    """(how often each computation runs, the bodies of loops of unknown length): callers are printed after callees."""
    times, unknown = {entry: 1}, []
    for name in reversed(computations):
        for instruction in computations[name]:
            trips = 1
            if instruction.opcode == "while" and times.get(name):
                parts = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", instruction.rest))
                trips = _trips(computations, instruction.rest, parts["condition"])
                unknown += [parts["body"]] * (trips is None)
            for callee in called(instruction):
                times[callee] = times.get(callee, 0) + times.get(name, 0) * (trips or 1)
    return times, unknown


def _trips(computations: Mapping[str, list[Instruction]], rest: str, condition: str) -> int | None:
    """How often a loop runs: as XLA says, or the one constant that its condition compares a counter from 0 with."""
    known = re.search(r"known_trip_count\W+n\W+(\d+)", rest)
    if known:
        return int(known[1])
    bounds, below, open_ = [], False, [condition]
    while open_:
        for instruction in computations.get(open_.pop(), ()):
            open_ += called(instruction)
            below |= instruction.opcode == "compare" and "direction=LT" in instruction.rest
            if instruction.opcode == "constant" and re.match(r"[su]32\[\]", instruction.type):
                bounds.append(int(instruction.operands))
    return bounds[0] if below and len(bounds) == 1 else None


def called(instruction: Instruction) -> Iterator[str]:
    """The computations that it calls; of a conditional the branches, in order."""
    if instruction.opcode in ("async-done", "async-update"):  # their start has run it
        return
    yield from _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from re.findall(r"[\w.\-]+", names)


def reaching(computations: Mapping[str, list[Instruction]], found: Callable[[Instruction], bool]) -> set[str]:
    """The computations that have such an instruction, or call one that has."""
    names: set[str] = set()
    for name, instructions in computations.items():
        if any(found(instruction) or not names.isdisjoint(called(instruction)) for instruction in instructions):
            names.add(name)
    return names


def _group(rest: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(the axes along which devices that exchange differ, how many they are); of a permutation, all its pairs."""
    sizes = tuple(mesh.values())
    pairs = _PAIRS.search(rest)
    if pairs:
        ends = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,\s]+)\}", pairs[1])])
        source, target = (np.stack(np.unravel_index(end, sizes)) for end in ends.T)
        return tuple(axis for axis, differs in zip(mesh, (source != target).any(1), strict=True) if differs), 2
    group = _first_group(rest, math.prod(sizes))
    places = np.stack(np.unravel_index(group, sizes))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1), len(group)


def _first_group(rest: str, devices: int) -> np.ndarray:
    """The devices that exchange with the first one, in any of the notations; all where none are named."""
    if named := _MESH_GROUP.search(rest):
        return _along_named_axes(named[1], named[2])
    if iota := _IOTA_GROUP.search(rest):
        ids = np.arange(math.prod(shape := [int(n) for n in iota[3].split(",")])).reshape(shape)
        ids = ids.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else ids
        return ids.reshape(int(iota[1]), int(iota[2]))[0]
    if listed := _LISTED_GROUP.search(rest):
        return np.array([int(n) for n in listed[1].split(",")])
    return np.arange(devices)


def _along_named_axes(sizes: str, chosen: str) -> np.ndarray:
    """`'a'=2,'b'=4` and `'b'`, or `'b':(2)2` for a part of an axis: the devices along them from device 0 on."""
    lengths = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    strides = dict(zip(lengths, np.cumprod([1, *reversed(lengths.values())])[-2::-1].tolist(), strict=True))
    group = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        count = int(part or lengths[name])
        stride = strides[name] * lengths[name] // (int(before or 1) * count)
        group = (group[:, None] + stride * np.arange(count)).reshape(-1)
    return group


def _closing(text: str, start: int = 0) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    return len(text)
