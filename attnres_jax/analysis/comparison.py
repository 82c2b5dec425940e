"""Comparison of arms: the table of what they reached and what they cost, as data and as text for a terminal."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnres_jax.analysis.arms import Arm, differing, group, same_tokens, warnings
from attnres_jax.analysis.judgement import Judgement, judge
from attnres_jax.analysis.runs import Run, read_run


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the table."""

    label: str
    read: Callable[[Run], float]
    digits: int
    """After the point."""
    scale: float = 1.0
    """What the value is divided by for display."""

    def show(self, arm: Arm) -> str:
        """Mean, and standard deviation where there are several seeds; a dash if unknown."""
        mean, spread = arm.mean(self.read) / self.scale, arm.spread(self.read) / self.scale
        if not math.isfinite(mean):
            return "not finite" if self.read in _LOSSES else "–"
        shown = f"{mean:,.{self.digits}f}"
        return f"{shown} ± {spread:,.{self.digits}f}" if spread > 1e-9 * abs(mean) else shown


_LOSSES = tuple(
    getattr(Run, key).fget for key in ("final_loss", "best_loss", "final_bits_per_byte", "best_bits_per_byte")
)

METRICS = (
    Metric("held-out loss, final", _LOSSES[0], 4),
    Metric("held-out loss, best", _LOSSES[1], 4),
    Metric("bits/byte, final", _LOSSES[2], 4),
    Metric("bits/byte, best", _LOSSES[3], 4),
    Metric("tokens/s", Run.tokens_per_second.fget, 0),
    Metric("step time, ms", Run.step_seconds.fget, 1, 1e-3),
    Metric("peak memory, MiB", Run.peak_memory_bytes.fget, 0, 2.0**20),
    Metric("compile time, s", Run.compile_seconds.fget, 1),
    Metric("tokens trained", Run.tokens.fget, 0),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms side by side; the first is the one the others are held against."""

    arms: tuple[Arm, ...]
    rows: tuple[tuple[str, ...], ...]
    """The table: label, then a cell an arm."""
    differences: Mapping[str, Sequence[Any]]
    """Config keys in which the arms differ, with their values."""
    judgements: tuple[Judgement, ...]
    """One for each pair of arms that is compared; those against the first arm come first."""
    warnings: tuple[str, ...]
    """What makes the runs hard to compare."""

    @property
    def runs(self) -> list[Run]:
        """All the runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]


def compare(workdirs: Sequence[str | Path]) -> Comparison:
    """Reads the workdirs and compares them.

    Raises:
      UserError: if there is none, one is given twice, is missing, or has nothing to compare yet.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    arms = group(runs)
    # Every pair where that is a line or three; beyond it, everything against the first.
    pairs = itertools.combinations(arms, 2) if len(arms) <= 3 else ((arms[0], arm) for arm in arms[1:])
    by_token = same_tokens(runs)
    judgements = tuple(judge(first, second, by_token=by_token) for first, second in pairs)
    return Comparison(tuple(arms), tuple(_rows(arms)), differing(runs), judgements, tuple(warnings(runs)))


def text(comparison: Comparison) -> str:
    """The comparison for a terminal: warnings, the aligned table, the judgements."""
    header = ("", *(arm.label for arm in comparison.arms))
    rows = [header, *comparison.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [f"warning: {line}" for line in comparison.warnings]
    lines += [""] if lines else []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if row is header:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
    if comparison.differences:
        lines += ["", f"The arms differ in {told_differences(comparison)}. Final held-out loss, judged:"]
        lines += [judgement.sentence for judgement in comparison.judgements]
    return "\n".join(lines)


def told_differences(comparison: Comparison) -> str:
    """`model.depth.rule (residual, block) and training.steps (100, 200)`."""
    told = [f"{key} ({', '.join(map(str, values))})" for key, values in comparison.differences.items()]
    return listed(told)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _rows(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    step = Run.step_seconds.fget
    ratios = [arm.mean(step) / arms[0].mean(step) for arm in arms]
    rows = [(metric.label, *(metric.show(arm) for arm in arms)) for metric in METRICS]
    place = 1 + next(index for index, metric in enumerate(METRICS) if metric.read is step)
    rows.insert(place, ("step time / first", *("–" if math.isnan(ratio) else f"{ratio:.3f}" for ratio in ratios)))
    # Seeds do not change the size of a model: no spread to show.
    sizes = [arm.runs[0].parameters for arm in arms]
    rows.append(("parameters", *("–" if math.isnan(size) else f"{size:,.0f}" for size in sizes)))
    rows.append(("seeds", *(_seeds(arm) for arm in arms)))
    return rows


def _seeds(arm: Arm) -> str:
    return ", ".join(map(str, arm.seeds)) + (f" (n = {len(arm.seeds)})" if len(arm.seeds) > 1 else "")
