"""Comparison of arms: the table, and one plain sentence on every difference, judged against the spread of seeds."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from attnres_jax.analysis.arms import Arm, group, same_tokens, warnings
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
        return shown if math.isnan(spread) else f"{shown} ± {spread:,.{self.digits}f}"


_LOSSES = tuple(getattr(Run, key).fget for key in ("final_loss", "best_loss", "final_bits_per_byte", "best_bits_per_byte"))

METRICS = (
    Metric("held-out loss, final", _LOSSES[0], 4),
    Metric("held-out loss, best", _LOSSES[1], 4),
    Metric("bits/byte, final", _LOSSES[2], 4),
    Metric("bits/byte, best", _LOSSES[3], 4),
    Metric("tokens/s", Run.tokens_per_second.fget, 0),
    Metric("step time, ms", Run.step_seconds.fget, 1, 1e-3),
    Metric("peak memory, MiB", Run.peak_memory_bytes.fget, 0, 2**20),
    Metric("compile time, s", Run.compile_seconds.fget, 1),
    Metric("tokens trained", Run.tokens.fget, 0),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms side by side; the first is the one the others are held against."""

    arms: tuple[Arm, ...]
    rows: tuple[tuple[str, ...], ...]
    """The table: label, then a cell an arm."""
    judgements: tuple[str, ...]
    """A sentence for each pair of arms that is compared."""
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
    return Comparison(tuple(arms), tuple(_rows(arms)), judgements, tuple(warnings(runs)))


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
    lines += ["", *comparison.judgements] if comparison.judgements else []
    return "\n".join(lines)


def judge(first: Arm, second: Arm, *, by_token: bool = True) -> str:
    """One sentence on the difference of `second` to `first` in final held-out loss.

    The spread of seeds is one standard deviation to either side: a difference is inside it when the two intervals
    overlap. Seeds that both arms have are also compared pair by pair, since a seed fixes the order of the data.

    Args:
      first: the arm held against.
      second: the arm judged.
      by_token: False compares bits per byte, for arms whose tokens are not the same pieces of text.
    """
    read = Run.final_loss.fget if by_token else Run.final_bits_per_byte.fget
    a, b = first.by_seed(read), second.by_seed(read)
    for arm, values in ((first, a), (second, b)):
        if not all(map(math.isfinite, values.values())):
            return f"{arm.label} did not end with a finite held-out loss: nothing to compare with it."
    difference = second.mean(read) - first.mean(read)
    if difference == 0:
        return f"{second.label} and {first.label} are exactly equal."
    unit = "" if by_token else " bits/byte"
    size = f"{_digits(difference)}{unit} ({100 * abs(difference) / abs(first.mean(read)):.2f} %)"
    claim = f"{second.label} is {_direction(difference)} than {first.label} by {size}"
    spreads = {arm: arm.spread(read) for arm in (first, second) if len(arm.seeds) > 1}
    if not spreads:
        return f"{claim}; n = 1: the spread of seeds is unknown, so this is one observation."
    told = " and ".join(f"± {_digits(spread)} over {len(arm.seeds)} seeds of {arm.label}" for arm, spread in spreads.items())
    inside = abs(difference) <= sum(spreads.values())
    place = f"{'inside' if inside else 'outside'} the spread of seeds ({told})"
    if len(spreads) == 1:
        single = first if second in spreads else second
        return f"{claim}: {place}, but {single.label} has n = 1, so this is one observation."
    paired = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
    agreeing = sum((value < 0) == (difference < 0) and value != 0 for value in paired)
    if len(paired) < 2:
        return f"{claim}: {place}."
    if agreeing < len(paired):
        return f"{claim} on average, in {agreeing} of {len(paired)} shared seeds: {place}."
    least, most = sorted((min(paired, key=abs), max(paired, key=abs)), key=abs)
    chance = f"equal arms would agree so 1 time in {2 ** (len(paired) - 1)}"
    every = f"in every one of {len(paired)} seeds (by {_digits(least)} to {_digits(most)}; {chance})"
    return f"{claim} on average and {_direction(difference)} {every}, {place}."


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


def _direction(difference: float) -> str:
    return "lower" if difference < 0 else "higher"


def _digits(value: float) -> str:
    return f"{abs(value):.4f}" if abs(value) >= 0.001 else f"{abs(value):.2g}"
