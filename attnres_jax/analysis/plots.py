"""Pictures of runs: matplotlib figures drawn without pyplot, so that they need neither a display nor a global state."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import FuncNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from attnres_jax.analysis.arms import Arm
from attnres_jax.analysis.runs import Run

# Grey for the first arm, then Okabe and Ito's colours, which colour-blind readers tell apart; dashes differ as well.
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")
# Dark red below zero, pale yellow at zero, dark blue above: what is positive looks alike beside what has both signs.
_SIGNED = ListedColormap(
    np.concatenate(
        [matplotlib.colormaps[name](np.linspace(0, 1, 256))[::step] for name, step in (("YlOrRd", -1), ("YlGnBu", 1))]
    )
)
MIXING_SCALE, MIXING_UNIT = 4.0, "weight / row mean (root scale)"
"""Of pictures of mixing matrices (`Mixing.relative`), the same in all: what is larger shares the darkest colour."""
INK, FAINT, BLANK = "#24292f", "#d0d7de", "#f3f4f6"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8c959f",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "figure.constrained_layout.use": True,
}
LOSS_UNITS = {"loss": "nats a token", "bits_per_byte": "bits a byte"}
_SIZE = (4.5, 3.2)
_UNITS = {
    "tokens": ("training tokens", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))),
    "flops": (
        "training compute",
        tuple((10.0**power, f"{prefix}FLOP") for power, prefix in zip(range(21, 5, -3), "ZEPTGM", strict=True)),
    ),
    "seconds": ("training time", ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))),
}


def loss_curves(arms: Sequence[Arm], *, kind: str = "heldout", against: str = "tokens", column: str = "loss") -> Figure:
    """Loss of every arm, a line each (mean of its seeds, a band from the lowest to the highest).

    Args:
      arms: what to draw.
      kind: "heldout" or "train" (smoothed over a fiftieth of the run).
      against: the column on the horizontal axis: "tokens", "flops" or "seconds".
      column: "loss", or of held-out text "bits_per_byte".
    """
    with _axes(_SIZE) as (figure, axes):
        ends, lines = [], []
        scale, label = _unit(arms, against)
        for arm, look in _looks(arms):
            x, y = _stack(arm, kind, against) / scale, _stack(arm, kind, column)
            if kind == "train":
                y = np.array([_smooth(row, max(1, len(row) // 50)) for row in y])
            marker = "o" if kind == "heldout" else None
            lines += axes.plot(x.mean(0), y.mean(0), label=_plain(arm.label), marker=marker, markersize=3, **look)
            if len(y) > 1:
                axes.fill_between(x.mean(0), y.min(0), y.max(0), color=look["color"], alpha=0.15, linewidth=0)
            ends.append(y[:, len(y[0]) // 10 :])
        # The fall of the first tenth would flatten all the rest: the axis is cut above it.
        late = np.concatenate([end.ravel() for end in ends])
        late = late[np.isfinite(late)]
        if late.size and np.ptp(late) > 0:
            axes.set_ylim(late.min() - 0.05 * np.ptp(late), late.max() + 0.05 * np.ptp(late))
        axes.set_xlabel(label)
        axes.set_ylabel(f"loss, {LOSS_UNITS[column]}")
        _legend(figure, lines)
    return figure


def loss_differences(arms: Sequence[Arm], *, column: str = "loss") -> Figure:
    """Held-out loss of every arm less the first arm's, at equal tokens; below zero is better than the first arm.

    Args:
      arms: what to draw.
      column: "loss" or "bits_per_byte".
    """
    with _axes(_SIZE) as (figure, axes):
        lines, first = [], _stack(arms[0], "heldout", column)
        scale, label = _unit(arms, "tokens")
        tokens = _stack(arms[0], "heldout", "tokens").mean(0) / scale
        for arm, look in _looks(arms):
            loss = _stack(arm, "heldout", column)
            here = _stack(arm, "heldout", "tokens").mean(0) / scale
            both, own, firsts = np.intersect1d(here, tokens, return_indices=True)
            gap = loss[:, own] - first[:, firsts].mean(0)
            lines += axes.plot(both, gap.mean(0), marker="o", markersize=3, label=_plain(arm.label), **look)
            if len(gap) > 1:
                axes.fill_between(both, gap.min(0), gap.max(0), color=look["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(label)
        axes.set_ylabel(f"difference, {LOSS_UNITS[column]}")
        _legend(figure, lines)
    return figure


def layer_profile(profiles: Mapping[str, np.ndarray], ylabel: str) -> Figure:
    """One quantity by sublayer, a line for each entry (label to array [L]): attention a circle, MLP a square."""
    with _axes(_SIZE) as (figure, axes):
        lines = []
        for (label, values), look in zip(profiles.items(), _cycle(), strict=False):
            layers = np.arange(1, len(values) + 1)
            lines += axes.plot(layers, values, label=_plain(label), zorder=2, **look)
            axes.plot(layers[::2], values[::2], "o", markersize=4, color=look["color"])
            axes.plot(layers[1::2], values[1::2], "s", markersize=3.4, color=look["color"], markerfacecolor="white")
        positive = np.concatenate([np.ravel(values) for values in profiles.values()])
        positive = positive[np.isfinite(positive) & (positive > 0)]
        if positive.size and positive.max() > 30 * positive.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("sublayer (filled circle: attention, open square: MLP)")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        _legend(figure, lines)
    return figure


def depth_heatmap(
    weights: np.ndarray,
    site_labels: Sequence[str],
    source_labels: Sequence[str],
    *,
    largest: float = 1.0,
    unit: str = "weight (square-root scale)",
) -> Figure:
    """Depth weights or a mixing matrix: a row a site from the first sublayer down to the readout, a column a source.

    Args:
      weights: [sites, sources], of either sign; NaN is left blank.
      site_labels: of the rows.
      source_labels: of the columns.
      largest: the size at the dark ends of the scale; give all pictures that are compared the same.
      unit: what the colours stand for.
    """
    sites, sources = weights.shape
    with _axes((4.6, min(8.0, 1.4 + 0.18 * sites))) as (figure, axes):
        mesh = _cells(axes, weights, largest, numbered=sources <= 10 and sites <= 34)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("source (what is read)")
        axes.set_ylabel("site (who reads)")
        for axis, labels in ((axes.xaxis, source_labels), (axes.yaxis, site_labels)):
            every = -(-len(labels) // 34)
            shown = [index for index in range(len(labels)) if index % every == 0 or index == len(labels) - 1]
            axis.set_ticks([index + 0.5 for index in shown], [labels[index] for index in shown], fontsize=8)
        axes.tick_params(axis="x", rotation=90 if sources > 6 else 0)
        _colour_bar(figure, mesh, weights, unit)
    return figure


def training_map(run: Run, key: str, unit: str, *, log: bool = False) -> Figure:
    """One of a run's depth diagnostics: training tokens to the right, sublayers or sites downwards.

    Args:
      run: with `diagnostics`.
      key: which of them, [R, L].
      unit: what the colours stand for.
      log: whether their scale is logarithmic; what is not above zero is left blank then.
    """
    values = run.diagnostics[key].T
    values = np.ma.masked_less_equal(values, 0) if log else np.ma.masked_invalid(values)
    scale, label = _unit_for(run.diagnostics["tokens"].max(), "tokens")
    edges = np.insert(run.diagnostics["tokens"] / scale, 0, 0.0)  # a column is what was trained on since the last one
    with _axes((4.6, min(8.0, 1.8 + 0.12 * len(values)))) as (figure, axes):
        axes.grid(False)
        axes.set_facecolor(BLANK)
        norm = (LogNorm if log else Normalize)(values.min(), values.max()) if values.count() else None
        mesh = axes.pcolormesh(edges, np.arange(len(values) + 1) + 0.5, values, cmap="YlGnBu", norm=norm)
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        axes.set_xlabel(label)
        axes.set_ylabel("sublayer" if values.shape[0] == run.diagnostics["output_rms"].shape[1] else "site")
        bar = figure.colorbar(mesh, ax=axes, aspect=30, pad=0.02)
        bar.set_label(unit)
        bar.outline.set_visible(False)
    return figure


def mixing_panels(matrices: Mapping[str, np.ndarray], *, columns: int = 5) -> Figure:
    """Mixing matrices side by side, sites downwards and sources to the right.

    Args:
      matrices: by title, [sites, sources] as `Mixing.relative` holds them.
      columns: panels in a row, at most.
    """
    columns = min(columns, len(matrices))
    rows = -(-len(matrices) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.75 * columns + 0.95, 1.95 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (title, matrix) in zip(panels.flat, matrices.items(), strict=False):
            axes.set_axis_on()
            axes.set_aspect("equal")
            axes.set_title(_plain(title), fontsize=9)
            mesh = _cells(axes, matrix, MIXING_SCALE)
            axes.set_xticks([])
            axes.set_yticks([])
        together = np.concatenate([np.ravel(matrix) for matrix in matrices.values()])
        _colour_bar(figure, mesh, together, MIXING_UNIT.replace(" (", "\n("))  # one row is too low for one line
    return figure


def _cells(axes: Axes, values: np.ndarray, largest: float, *, numbered: bool = False) -> QuadMesh:
    """A cell a value, row 0 on top, NaN left blank, with its number in it if `numbered`."""
    axes.grid(False)
    axes.set_facecolor(BLANK)
    scale = FuncNorm((_signed_root, _signed_square), -largest, largest)
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=_SIGNED, norm=scale, edgecolors="white", linewidth=0.5)
    for row, column in np.argwhere(np.isfinite(values)) if numbered else ():
        value = values[row, column]
        colour = "white" if abs(value) > 0.42 * largest else INK
        place = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "color": colour}
        axes.text(column + 0.5, row + 0.5, re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}"), **place)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _colour_bar(figure: Figure, mesh: QuadMesh, values: np.ndarray, label: str) -> None:
    """The part of the scale that is in use: below zero only where a value is; an arrow where one is beyond an end."""
    largest, known = mesh.norm.vmax, values[np.isfinite(values)]
    lowest = max(-largest, float(known.min(initial=0.0)))
    known_sizes = (0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1) if largest <= 1 else (0.05, 0.2, 0.4, 0.7, 1, 2, 4)
    sizes = [size for size in known_sizes if size <= largest]
    ticks = [*(-size for size in reversed(sizes) if -size >= lowest), 0, *sizes]
    beyond = {(False, False): "neither", (False, True): "max", (True, False): "min", (True, True): "both"}
    extend = beyond[bool((known < -largest).any()), bool((known > largest).any())]
    bar = figure.colorbar(mesh, ax=figure.axes, ticks=ticks, aspect=30, pad=0.02, extend=extend)
    bar.ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    bar.ax.set_ylim(lowest, largest)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _signed_root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


@contextmanager
def _axes(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.subplots()


def _plain(label: str) -> str:
    """Dollars as they are: matplotlib takes what is between two for mathematics."""
    return label.replace("$", r"\$")


def _legend(figure: Figure, lines: Sequence[Line2D]) -> None:
    """Above the axes, where it hides nothing. By name, or a label that begins with an underscore would be left out."""
    labels = [line.get_label() for line in lines]
    columns = len(labels) if sum(map(len, labels)) <= 40 else max(1, 50 // (8 + max(map(len, labels))))
    figure.legend(lines, labels, loc="outside upper left", ncols=columns)
    # The axes keep their height, however many lines there are.
    figure.set_figheight(_SIZE[1] + 0.18 * max(0, -(-len(labels) // columns) - 3))


def _looks(arms: Sequence[Arm]) -> Iterator[tuple[Arm, dict[str, str]]]:
    return zip(arms, _cycle(), strict=False)


def _cycle() -> Iterator[dict[str, str]]:
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False)
    return ({"color": colour, "linestyle": dashes} for colour, dashes in pairs)


def _stack(arm: Arm, kind: str, column: str) -> np.ndarray:
    """[runs, rows] of a column, at the steps which all the runs of the arm have."""
    read: Callable[[Run], Mapping[str, np.ndarray]] = (
        (lambda run: run.heldout) if kind == "heldout" else (lambda run: run.train)
    )
    steps = sorted(set.intersection(*(set(read(run)["step"]) for run in arm.runs)))
    return np.array([read(run)[column][np.isin(read(run)["step"], steps)] for run in arm.runs])


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Trailing mean over `width` rows, over fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def _unit(arms: Sequence[Arm], column: str) -> tuple[float, str]:
    """What to divide a column by so that its axis needs no exponent, and the label of that axis."""
    return _unit_for(max(run.heldout[column].max() for arm in arms for run in arm.runs), column)


def _unit_for(largest: float, column: str) -> tuple[float, str]:
    name, units = _UNITS[column]
    scale, unit = next(((scale, unit) for scale, unit in units if largest >= 2 * scale), units[-1])
    return scale, f"{name}, {unit}"
