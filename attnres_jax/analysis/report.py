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
from attnres_jax.analysis.arms import Arm
from attnres_jax.analysis.comparison import Comparison, listed, told_differences
from attnres_jax.analysis.page import page, paragraphs, picture, table
from attnres_jax.analysis.runs import Run, RunError


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
    parts += ["<h2>What the sites read</h2>", *_depth_weights(arms)]
    parts += ["<h2>The runs</h2>", _run_table(comparison.runs)]
    return page(title, "\n".join(parts))


def summary(comparison: Comparison) -> str:
    """What the numbers say, in a paragraph."""
    arms = comparison.arms
    tokens = sorted({run.tokens for run in comparison.runs})
    amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"between {tokens[0]:,} and {tokens[-1]:,}"
    runs = f"{len(comparison.runs)} runs, each" if len(comparison.runs) > 1 else "One run,"
    sentences = [f"{runs} trained on {amount} tokens."]
    losses = {arm.label: arm.mean(Run.final_loss.fget) for arm in arms}
    finite = {label: loss for label, loss in losses.items() if math.isfinite(loss)}
    ranked = sorted(finite, key=finite.get)
    if ranked:
        told = listed([f"{label} {finite[label]:.4f}" for label in ranked])
        sentences.append(f"Final held-out loss in nats a token, lowest first: {told}.")
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


def _loss_pictures(arms: Sequence[Arm]) -> list[str]:
    ends = listed([f"{arm.label} {arm.mean(Run.final_loss.fget):.4f}" for arm in arms])
    first = arms[0].label
    held = f"Last values: {ends}."
    pictures = [
        picture(
            plots.loss_curves(arms),
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
                plots.loss_differences(arms),
                f"Held-out loss less that of {first}",
                f"Lines of held-out loss less that of {first}, against training tokens. {held}",
                f"The same curves less that of {first}: below zero is better than {first}, above zero worse. "
                "A gap that wanders across zero is no difference; bands that overlap ask for more seeds.",
            )
        )
    pictures += [
        picture(
            plots.loss_curves(arms, against="flops"),
            "Held-out loss against compute",
            f"Lines of held-out loss against training FLOPs. {held}",
            "The arithmetic is counted from the shapes of the model, forward and backward. "
            "At equal compute the lower line makes more of it; a rule with more arithmetic a token is shifted right.",
        ),
        picture(
            plots.loss_curves(arms, against="seconds"),
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
            "Training loss that falls while held-out loss rises means that the model memorises.",
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


def _depth_weights(arms: Sequence[Arm]) -> list[str]:
    maps = _inspected(arms, "depth_weights", lambda arrays: np.mean(arrays, axis=0))
    if not maps:
        plain = all(arm.runs[0].config.model.depth.rule == "residual" for arm in arms)
        return ["<p>No arm has depth weights: a residual stream is a plain sum.</p>" if plain else _not_inspected(arms)]
    # Where there is one source only its weight is 1 by necessity: the scale ends at the largest that was learned.
    largest = max(np.nanmax(weights[1:]) for weights in maps.values())
    pictures = []
    for arm in arms:
        if arm.label not in maps:
            continue
        weights, labels = maps[arm.label], next(run.inspection for run in arm.runs if "depth_weights" in run.inspection)
        sites, sources = [str(x) for x in labels["site_labels"]], [str(x) for x in labels["source_labels"]]
        read = [
            f"{site} reads most from {sources[np.nanargmax(row)]}" for site, row in zip(sites, weights, strict=True)
        ]
        figure = plots.depth_heatmap(weights, sites, sources, largest=float(largest))
        alt = f"Heat map of the depth weights of {arm.label}, sites by sources. {'; '.join(read)}."
        caption = (
            "A row is a site and shows how it divides itself over what was there to read, as a mean over held-out "
            "tokens: a row sums to one, and grey cells did not exist yet. Before training every row is even; "
            "a darker cell is a source that the site learned to favour."
        )
        pictures.append(picture(figure, arm.label, alt, caption))
    note = "One colour scale for all arms. The first site has the embedding alone to read, with a weight of 1."
    missing = [arm.label for arm in arms if arm.label not in maps and arm.runs[0].config.model.depth.rule == "residual"]
    if missing:
        note += f" {listed(missing)} has no map: a residual stream is a plain sum."
    return [f"<p>{html.escape(note)}</p>", _grid(pictures)]


def _inspected(arms: Sequence[Arm], key: str, mean: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """`key` of inspection.npz by arm, the mean over its seeds; arms without it are left out."""
    found = {arm.label: [run.inspection[key] for run in arm.runs if key in run.inspection] for arm in arms}
    return {label: mean(np.stack(arrays)) for label, arrays in found.items() if arrays}


def _not_inspected(arms: Sequence[Arm]) -> str:
    workdir = arms[0].runs[0].workdir
    call = f"attnres_jax.analysis.inspect_run({str(workdir)!r})"
    told = f"No run holds an inspection.npz yet: training writes it at its end, or {call} does."
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
