"""The report: a comparison as one HTML file with its pictures, each with how to read it."""

import contextlib
import datetime
import html
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnres_jax.analysis import plots
from attnres_jax.analysis.arms import Arm, same_tokens
from attnres_jax.analysis.comparison import Comparison, Metric, listed, told_differences
from attnres_jax.analysis.mixing import MEASURES, Mixing, depth_mixing
from attnres_jax.analysis.page import page, paragraphs, picture, table
from attnres_jax.analysis.runs import Run, RunError
from attnres_jax.training.diagnostics import SPIKE

DIAGNOSTICS = {
    "output_rms": (
        "Output magnitude",
        "RMS",
        True,
        "What each sublayer returns, tokens and channels together. A row that leaves the others is a sublayer whose "
        "output runs away or dies.",
    ),
    "output_grad_rms": (
        "Gradient magnitude",
        "RMS of the gradient",
        True,
        "The gradient of the loss with respect to those outputs. Depths of equal colour are trained alike.",
    ),
    "depth_entropy": (
        "Entropy of depth weights",
        "nats",
        False,
        "Of each site's weights; the last is the readout. Later sites have more sources and can have more. A row that "
        "fades is a site that settles on few sources.",
    ),
    "depth_max_weight": (
        "Largest depth weight",
        "weight",
        False,
        "Of each site; at 1 it reads one source alone, as the first site must.",
    ),
}
"""The depth diagnostics: title, unit, whether the scale is logarithmic, and how to read it."""


def write_report(comparison: Comparison, path: str | Path) -> Path:
    """Writes the report, whole or not at all; folders on the way are made.

    Raises:
      RunError: if it cannot be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(report(comparison), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"report '{path}' cannot be written: {error.strerror}; name another file") from None
    return path


def report(comparison: Comparison) -> str:
    """The HTML."""
    arms = comparison.arms
    names = listed([arm.label for arm in arms]) if len(arms) <= 4 else f"{len(arms)} arms"
    title = f"{names} compared" if len(arms) > 1 else names
    colours = itertools.cycle(plots.COLOURS)
    swatches = [
        f'<span class="swatch" style="background:{colour}"></span>{html.escape(arm.label)}'
        for arm, colour in zip(arms, colours, strict=False)
    ]
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="meta">{html.escape(_provenance(comparison.runs))}</p>']
    if comparison.warnings:
        parts.append(f'<div class="warning" role="note">\n{paragraphs(comparison.warnings)}\n</div>')
    parts.append(f'<p class="lead">{html.escape(summary(comparison))}</p>')
    parts.append(table(["", *swatches], [list(row) for row in comparison.rows]))
    if any(len(arm.seeds) > 1 for arm in arms):
        parts.append("<p>Several seeds are shown as mean ± standard deviation.</p>")
    if comparison.judgements:
        judged = [judgement.sentence for judgement in comparison.judgements]
        parts += ["<h2>Final held-out loss, judged</h2>", f"<ul>\n{paragraphs(judged, 'li')}\n</ul>"]
    parts += ["<h2>Loss</h2>", _grid(_loss_pictures(arms))]
    parts += ["<h2>Magnitudes by depth</h2>", _grid(_magnitude_pictures(arms)) or _not_inspected(arms)]
    parts += _diagnostics(arms)
    parts += ["<h2>What the sites read</h2>", *_depth_weights(arms)]
    parts += ["<h2>The depth-mixing matrix</h2>", *_mixing(arms)]
    parts += ["<h2>The runs</h2>", _run_table(comparison.runs)]
    return page(title, "\n".join(parts))


def summary(comparison: Comparison) -> str:
    """What the numbers say, in a paragraph."""
    arms = comparison.arms
    tokens = sorted({run.tokens for run in comparison.runs})
    amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"between {tokens[0]:,} and {tokens[-1]:,}"
    runs = f"{len(comparison.runs)} runs, each" if len(comparison.runs) > 1 else "One run,"
    sentences = [f"{runs} trained on {amount} tokens."]
    column, final = _held_out(comparison.runs)
    losses = {arm.label: arm.mean(final) for arm in arms}
    finite = {label: loss for label, loss in losses.items() if math.isfinite(loss)}
    ranked = sorted(finite, key=finite.get)
    if ranked:
        told = listed([f"{label} {finite[label]:.4f}" for label in ranked])
        sentences.append(f"Final held-out loss in {plots.LOSS_UNITS[column]}, lowest first: {told}.")
    sentences += [f"{label} did not end with a finite loss." for label in losses if label not in finite]
    if len(arms) > 1:
        sentences.append(f"The arms differ in {told_differences(comparison)}.")
        against = zip(
            arms[1:], comparison.judgements, strict=False
        )  # the first of them are those against the first arm
        verdicts = [f"{arm.label} is {judgement.brief}" for arm, judgement in against]
        sentences.append(f"In final held-out loss, held against {arms[0].label}: {'; '.join(verdicts)}.")
        if all(len(arm.seeds) == 1 for arm in arms):
            sentences.append("With one seed an arm, the order of the arms may be chance.")
        step = Run.step_seconds.fget
        ratios = [(arm.label, arm.mean(step) / arms[0].mean(step)) for arm in arms[1:]]
        costs = [f"{ratio:.2f} times as long with {label}" for label, ratio in ratios if math.isfinite(ratio)]
        if costs:
            sentences.append(f"A step takes {listed(costs)} as with {arms[0].label}.")
    return " ".join(sentences)


def _provenance(runs: Sequence[Run]) -> str:
    """When, on what and with which versions."""
    days = sorted(filter(None, (_day(run.summary.get("date")) for run in runs)))
    dates = dict.fromkeys((days[0], days[-1])) if days else ["date unknown"]
    devices = dict.fromkeys(run.summary.get("device") for run in runs if run.summary.get("device"))
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, version in run.summary.get("versions", {}).items():
            seen.setdefault(name, {})[version] = None
    versions = ", ".join(f"{name} {'/'.join(found)}" for name, found in seen.items())
    shown = [_spelled(day) if isinstance(day, datetime.date) else day for day in dates]
    return " · ".join(filter(None, (" to ".join(shown), ", ".join(devices) or "hardware unknown", versions)))


def _day(date: Any) -> datetime.date | None:
    try:
        return datetime.datetime.fromisoformat(date).date()
    except (TypeError, ValueError):
        return None


def _spelled(day: datetime.date) -> str:
    return f"{day.day} {day:%B %Y}"


def _held_out(runs: Sequence[Run]) -> tuple[str, Callable[[Run], float]]:
    """The column by which these runs may be compared, and the last value in it."""
    if same_tokens(runs):
        return "loss", Run.final_loss.fget
    return "bits_per_byte", Run.final_bits_per_byte.fget


def _loss_pictures(arms: Sequence[Arm]) -> list[str]:
    column, final = _held_out([run for arm in arms for run in arm.runs])
    ends = listed([f"{arm.label} {arm.mean(final):.4f}" for arm in arms])
    first = arms[0].label
    own_tokens = "" if column == "loss" else " A token is not the same piece of text in all arms: not to be compared."
    held = f"Last values: {ends}."
    pictures = [
        picture(
            plots.loss_curves(arms, column=column),
            "Held-out loss",
            f"Lines of held-out loss against training tokens. {held}",
            "Loss on text that no arm was trained on, at equal amounts of training text: lower is better. "
            "With several seeds the line is their mean and the band reaches from the lowest to the highest; "
            "the axis leaves out the fall of the first tenth.",
        )
    ]
    if len(arms) > 1:
        pictures.append(
            picture(
                plots.loss_differences(arms, column=column),
                f"Held-out loss less that of {first}",
                f"Lines of held-out loss less that of {first}, against training tokens. {held}",
                f"The same curves less that of {first}: below zero is better than {first}, above zero worse. "
                "A gap that wanders across zero is no difference; bands that overlap ask for more seeds.",
            )
        )
    pictures += [
        picture(
            plots.loss_curves(arms, against="flops", column=column),
            "Held-out loss against compute",
            f"Lines of held-out loss against training FLOPs. {held}",
            "The arithmetic is counted from the shapes of the model, forward and backward. "
            "At equal compute the lower line makes more of it; a rule with more arithmetic a token is shifted right.",
        ),
        picture(
            plots.loss_curves(arms, against="seconds", column=column),
            "Held-out loss against time",
            f"Lines of held-out loss against the time of the training loop. {held}",
            "Time of the training loop on this machine, without compilation, evaluation and saving. "
            "A rule that costs memory traffic pays for it here and not under compute; so does a run that shared its "
            "machine with other work, which is why benchmarks/step.py measures step times in pairs.",
        ),
        picture(
            plots.loss_curves(arms, kind="train"),
            "Training loss",
            "Lines of training loss against training tokens.",
            "Loss on the batches trained on, averaged over the last fiftieth of the run: noisier than held-out loss. "
            f"Training loss that falls while held-out loss rises means that the model memorises.{own_tokens}",
        ),
    ]
    return pictures


def _magnitude_pictures(arms: Sequence[Arm]) -> list[str]:
    pictures = []
    for key, title, ylabel, caption in (
        (
            "state_rms",
            "Output magnitude by sublayer",
            "RMS",
            "RMS of what stands after each sublayer: the residual stream, the partial sum of the block, or for full "
            "AttnRes the output itself. A residual stream adds up everything before it and so grows with depth; "
            "a partial sum starts anew with every block, which shows as a saw-tooth.",
        ),
        (
            "gradient_rms",
            "Gradient magnitude by sublayer",
            "RMS of the gradient",
            "RMS of the gradient of the loss, summed over tokens, with respect to each sublayer's output. "
            "A line that falls steeply with depth means that the early sublayers are pushed hardest; a level one, "
            "that all depths are pushed alike. Small outputs have large gradients: read it beside the magnitudes.",
        ),
    ):
        profiles = _inspected(arms, key, lambda arrays: np.sqrt(np.mean(np.square(arrays), axis=0)))
        if profiles:
            told = [f"{label} from {values[0]:.3g} to {values[-1]:.3g}" for label, values in profiles.items()]
            alt = f"Lines of {ylabel} by sublayer, from the first to the last: {listed(told)}."
            pictures.append(picture(plots.layer_profile(profiles, ylabel), title, alt, caption))
    return pictures


def _diagnostics(arms: Sequence[Arm]) -> list[str]:
    """Of each arm the depth diagnostics of its first run that has them; nothing where none was measured."""
    pictures, spikes = [], []
    for arm in arms:
        run = next((run for run in arm.runs if run.diagnostics), None)
        if run is None:
            continue
        label = arm.label if len(arm.runs) == 1 else f"{arm.label}, seed {run.config.seed}"
        for key, (title, unit, log, caption) in DIAGNOSTICS.items():
            if key not in run.diagnostics:
                continue
            first, last = run.diagnostics[key][0], run.diagnostics[key][-1]
            alt = (
                f"Map of the {title.lower()} of {label} by depth and training tokens: from {first.min():.3g} to "
                f"{first.max():.3g} at first, from {last.min():.3g} to {last.max():.3g} at last."
            )
            figure = plots.training_map(run, key, unit, log=log)
            pictures.append(picture(figure, f"{label}: {title.lower()}", alt, caption))
        steps = run.diagnostics["step"][run.diagnostics["depth/spike"] > 0]
        more = " and later" if len(steps) > 5 else ""
        at = f"at step {', '.join(f'{step:.0f}' for step in steps[:5])}{more}" if len(steps) else "at no time"
        spikes.append(f"{label}: {at}")
    if not pictures:
        return []
    told = [
        "Measured every so many steps, on part of a batch: training tokens go to the right, depth goes down.",
        f"Spikes of the first sublayer, over {SPIKE:g} times the median output: {'; '.join(spikes)}.",
    ]
    return ["<h2>Depth over training</h2>", paragraphs(told), _grid(pictures)]


def _depth_weights(arms: Sequence[Arm]) -> list[str]:
    maps = _inspected(arms, "depth_weights", lambda arrays: np.mean(arrays, axis=0))
    without = [arm.label for arm in arms if arm.label not in maps and any(run.inspection for run in arm.runs)]
    if not maps:
        plain = len(without) == len(arms)
        return ["<p>No arm has depth weights: a stream has none.</p>" if plain else _not_inspected(arms)]
    # Where there is one source only its weight is 1 by necessity: the scale ends at the largest that was learned.
    largest = max(np.nanmax(np.abs(weights[1:])) for weights in maps.values())
    pictures = []
    for arm in arms:
        if arm.label not in maps:
            continue
        weights = maps[arm.label]
        sites, sources = _labels(arm, "site_labels"), _labels(arm, "source_labels")
        read = [f"{site} reads most from {sources[_largest(row)]}" for site, row in zip(sites, weights, strict=True)]
        figure = plots.depth_heatmap(weights, sites, sources, largest=float(largest))
        alt = f"Heat map of the depth weights of {arm.label}, sites by sources. {'; '.join(read)}."
        caption = (
            "A row is a site and shows its weight for each source that was there to read, as a mean over held-out "
            "tokens; grey cells did not exist yet. A row of softmax weights sums to one and is even before training: "
            "a darker cell is a source that the site learned to favour."
        )
        caption += " Yellow to red is below zero." if np.nanmin(weights) < 0 else ""
        pictures.append(picture(figure, arm.label, alt, caption))
    note = "One colour scale for all arms. The first site has one source alone to read."
    if without:
        note += f" {listed(without)} {_have(without)} no map: a stream has no depth weights."
    return [f"<p>{html.escape(note)}</p>", _grid(pictures)]


def _mixing(arms: Sequence[Arm]) -> list[str]:
    matrices = _inspected(arms, "mixing_matrix", lambda arrays: np.mean(arrays, axis=0))
    if not matrices:
        return [_not_inspected(arms, "with this matrix")]
    shown = [arm for arm in arms if arm.label in matrices]
    pictures = [_mixing_picture(arm, depth_mixing(matrices[arm.label])) for arm in shown]
    # Of each run, not of the mean over its seeds: matrices that differ would look more even than any of them is.
    measured = {
        run: depth_mixing(run.inspection["mixing_matrix"]).summary()
        for arm in shown
        for run in arm.runs
        if "mixing_matrix" in run.inspection
    }
    rows = []
    for key, label in MEASURES.items():
        metric = Metric(label, lambda run, key=key: measured[run][key] if run in measured else math.nan, 3)
        rows.append([label, *(metric.show(arm) for arm in shown)])
    how_to_read = (
        "What every site effectively reads of the embedding and of each sublayer's output, through streams, blocks and "
        "weights alike, as a mean over held-out tokens: the form in which all depth rules compare. A site reads behind "
        "a norm, which takes away the scale of its row, so each row is drawn over the mean size of its weights: 1 is "
        "an even share, and the residual baseline is 1 throughout."
    )
    measures = (
        "The table has means over all sites but the first, which reads the embedding alone; a share is a weight's size "
        "over the sum of its row. Entropy over the logarithm of the number of sources is 1 where all count alike. The "
        "effective rank is exp of the entropy of the matrix's singular values. The separable rank is the largest "
        "effective rank of what crosses one depth of the stack: 1 where a single stream could carry it all, as for "
        "the residual baseline."
    )
    without = [arm.label for arm in arms if arm not in shown]
    if without:
        how_to_read += (
            f" {listed(without)} {_have(without)} none yet: attnres_jax.analysis.inspect_run(workdir) adds it."
        )
    header = ["", *(html.escape(arm.label) for arm in shown)]
    return [paragraphs([how_to_read]), _grid(pictures), paragraphs([measures]), table(header, rows)]


def _mixing_picture(arm: Arm, mixing: Mixing) -> str:
    sites, outputs = _labels(arm, "site_labels"), _labels(arm, "output_labels")
    figure = plots.depth_heatmap(mixing.relative, sites, outputs, largest=plots.MIXING_SCALE, unit=plots.MIXING_UNIT)
    site, output = np.unravel_index(_largest(mixing.relative), mixing.relative.shape)
    largest, embedding = mixing.relative[site, output], mixing.embedding_share
    alt = (
        f"Heat map of the depth-mixing matrix of {arm.label}, sites by embedding and outputs. The largest "
        f"weight, {largest:.1f} times an even share, is that of {outputs[output]} at {sites[site]}. "
        f"The embedding's share is {embedding[1]:.2f} at {sites[1]} and {embedding[-1]:.2f} at the readout."
    )
    caption = (
        "A row is a site, a column the embedding or the output of a sublayer; grey cells did not exist yet. Darker "
        "blue is read more than evenly, greener less, and yellow to red with a negative sign. A weight is no "
        "contribution: an output that is large counts for more than its weight, one that says what others say for less."
    )
    return picture(figure, arm.label, alt, caption)


def _labels(arm: Arm, key: str) -> list[str]:
    return [str(label) for label in next(run.inspection[key] for run in arm.runs if key in run.inspection)]


def _largest(values: np.ndarray) -> int:
    """Where the largest size is, among numbers."""
    return int(np.argmax(np.nan_to_num(np.abs(values))))


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _inspected(arms: Sequence[Arm], key: str, mean: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """`key` of inspection.npz by arm, the mean over its seeds; arms without it are left out."""
    found = {arm.label: [run.inspection[key] for run in arm.runs if key in run.inspection] for arm in arms}
    return {label: mean(np.stack(arrays)) for label, arrays in found.items() if arrays}


def _not_inspected(arms: Sequence[Arm], what: str = "yet") -> str:
    workdir = arms[0].runs[0].workdir
    call = f"attnres_jax.analysis.inspect_run({str(workdir)!r})"
    told = f"No run holds an inspection.npz {what}: training writes it at its end, or {call} does."
    return f"<p>{html.escape(told)}</p>"


def _run_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            str(run.workdir),
            str(run.config.seed),
            str(run.summary.get("status", "unfinished")),
            f"{run.heldout['step'][-1]:,.0f} of {run.config.training.steps:,}",
            f"{run.final_loss:.4f}",
            str(run.summary.get("date", "–"))[:16].replace("T", " "),
        ]
        for run in runs
    ]
    return table(["workdir", "seed", "status", "steps", "held-out loss", "ended"], rows)


def _grid(pictures: Sequence[str]) -> str:
    return "\n".join(['<div class="grid">', *pictures, "</div>"]) if pictures else ""
