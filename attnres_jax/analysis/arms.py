"""Arms: runs that differ by seed alone taken together, and what keeps two of them from being compared."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnres_jax.analysis.runs import Run, RunError
from attnres_jax.config import flatten
from attnres_jax.training.workdir import IRRELEVANT

# Keys, or the beginnings of keys, that do not change what is trained.
_BOOKKEEPING = (
    *IRRELEVANT,
    "name",
    "seed",
    "metrics.",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """Runs of one configuration, a seed each."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The distinct seeds, sorted."""
        return tuple(sorted({run.config.seed for run in self.runs}))

    def by_seed(self, read: Callable[[Run], float]) -> dict[int, float]:
        """`read` of every seed; runs that repeat a seed are averaged, for they say nothing about its spread."""
        return {
            seed: float(np.mean([read(run) for run in self.runs if run.config.seed == seed])) for seed in self.seeds
        }

    def mean(self, read: Callable[[Run], float]) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.by_seed(read).values())))

    def spread(self, read: Callable[[Run], float]) -> float:
        """Sample standard deviation over the seeds; NaN for one seed."""
        values = list(self.by_seed(read).values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def group(runs: Sequence[Run]) -> list[Arm]:
    """Groups runs into arms, in the order in which each arm is first named.

    An arm is labelled by the name of its first run; where two arms share it, by what tells them apart too.

    Raises:
      RunError: if a workdir is given twice, or none is given.
    """
    if not runs:
        raise RunError("no workdir to compare; usage: python compare.py runs/a runs/b [--report=FILE]")
    places = [run.workdir.resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise RunError(f"workdir '{runs[index].workdir}' is given twice; name each run once")
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(_compared(run).items()), []).append(run)
    members = list(groups.values())
    names = [group[0].config.name for group in members]
    return [Arm(_label(index, members, names), tuple(runs)) for index, runs in enumerate(members)]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config keys in which the runs differ, bookkeeping apart, with the values in order of appearance."""
    flat = [_compared(run) for run in runs]
    values = {key: list(dict.fromkeys(one[key] for one in flat)) for key in flat[0]}
    return {key: seen for key, seen in values.items() if len(seen) > 1}


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing these runs: a plain sentence each, empty if there is nothing."""
    lines = [note for run in runs for note in run.notes]
    keys = differing(runs)
    data = [key for key in keys if key.startswith("data.") or key == "model.vocab_size"]
    lines += [f"Different data: {_split(runs, key, lambda run, key=key: _compared(run)[key])}." for key in data]
    for key, read, what in (
        ("data_fingerprint", lambda run: run.summary.get("data_fingerprint"), "Different data"),
        ("tokens", lambda run: run.tokens, "Different amounts of training"),
        ("training.eval_sequences", lambda run: run.config.training.eval_sequences, "Different held-out sets"),
        ("device", lambda run: run.summary.get("device"), "Speed and memory were measured on different machines"),
    ):
        line = _split([run for run in runs if read(run) is not None], key, read)
        if line:
            lines.append(f"{what}: {line}.")
    if "data.source" not in keys and runs[0].config.data.source == "stdlib":
        # The standard library's source is a corpus that changes with the Python version.
        known = [run for run in runs if run.summary and "data_fingerprint" not in run.summary]
        line = _split(known, "Python", lambda run: run.summary.get("versions", {}).get("python"))
        if line:
            lines.append(f"Different data: data.source=stdlib is the library of the running Python, and {line}.")
    for arm in group(runs):
        if len(arm.seeds) < len(arm.runs):
            lines.append(f"{arm.label} repeats a seed: repeated runs are averaged and count as one seed.")
    return lines


def same_tokens(runs: Sequence[Run]) -> bool:
    """Whether a token is the same piece of text in all the runs: else compare bits per byte, not loss."""
    keys = differing(runs)
    prints = {run.summary.get("data_fingerprint") for run in runs} - {None}
    tokenizer = ("model.vocab_size", "data.source", "data.files", "data.heldout_percent")  # what it is trained from
    return len(prints) < 2 and not any(key in keys for key in tokenizer)


def _compared(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flatten(run.config).items() if not key.startswith(_BOOKKEEPING)}


def _label(index: int, members: list[list[Run]], names: list[str]) -> str:
    rivals = [runs[0] for runs, name in zip(members, names, strict=True) if name == names[index]]
    if len(rivals) == 1:
        return names[index]
    own = _compared(members[index][0])
    told = ", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in differing(rivals))
    return f"{names[index]} ({told})"


def _split(runs: Sequence[Run], key: str, read: Callable[[Run], Any]) -> str:
    """`key is 1 in runs/a, runs/b and 2 in runs/c`; empty if all agree."""
    places: dict[Any, list[str]] = {}
    for run in runs:
        places.setdefault(read(run), []).append(str(run.workdir))
    if len(places) < 2:
        return ""
    shown = [f"{value:,}" if type(value) is int else repr(value) for value in places]
    where = [", ".join(at[:3]) + (f" and {len(at) - 3} more" if len(at) > 3 else "") for at in places.values()]
    return f"{key} is " + "; ".join(f"{value} in {at}" for value, at in zip(shown, where, strict=True))
