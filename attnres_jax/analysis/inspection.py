"""Inspection of a trained model: what its sites read, and how large outputs and gradients are by sublayer."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attnres_jax.config import read_config
from attnres_jax.data import heldout_batches
from attnres_jax.evaluation.perplexity import Batch
from attnres_jax.models import Decoder
from attnres_jax.parallel import mesh_that_fits, use_mesh
from attnres_jax.training import restore_model, restore_text
from attnres_jax.training.diagnostics import output_gradients

MAGNITUDES = ("output_rms", "state_rms", "gradient_rms", "input_rms")


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """Means over the tokens of some held-out sequences; L sublayers, an attention and an MLP in turn."""

    output_rms: Float[np.ndarray, "L"]
    """RMS over tokens and channels of what each sublayer returns."""
    state_rms: Float[np.ndarray, "L"]
    """Of the residual stream after it, or of the block's partial sum (`full`: the output itself)."""
    gradient_rms: Float[np.ndarray, "L"]
    """Of the gradient of the summed token losses with respect to what each sublayer returns."""
    input_rms: Float[np.ndarray, "sites"]
    """Of what each sublayer reads and, last, of what the output head reads."""
    depth_weights: Float[np.ndarray, "sites sources"] | None
    """Mean weight of each source at each site, NaN where a site has no such source; None for a rule without weights."""
    site_labels: tuple[str, ...]
    source_labels: tuple[str, ...]
    """Of the columns of `depth_weights`. A block's column also holds its partial sum, for the sites inside it."""
    mixing_matrix: Float[np.ndarray, "L+1 L+1"]
    """Mean effective weight of the embedding and each output at each site, under any rule; NaN above the diagonal."""
    output_labels: tuple[str, ...]
    """Of the columns of `mixing_matrix`: the embedding, then the sublayers."""

    def save(self, path: Path, step: int | None = None) -> None:
        """Writes an .npz file, whole or not at all; with the step of the checkpoint, if one is given."""
        arrays = {key: value for key, value in (dataclasses.asdict(self) | {"step": step}).items() if value is not None}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)


def inspect_run(workdir: Path | str, *, num_sequences: int = 4) -> Inspection:
    """Inspects the newest checkpoint of a run on held-out text and writes inspection.npz into its workdir.

    The model lies on the run's own mesh where there are the devices for it, else on one; the processes of a group do
    this together.

    Raises:
      UserError: if the run has no checkpoint to load, or its text cannot be read or is no longer the one it was.
    """
    path = Path(workdir) / "inspection.npz"
    config = read_config(path.with_name("config.json"))
    mesh = mesh_that_fits(config)
    _, model, step = restore_model(workdir, mesh=mesh)
    batches = heldout_batches(restore_text(workdir, step), config.data, num_sequences)
    whole = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    with use_mesh(mesh):
        inspection = inspect_model(model, whole)
    if jax.process_index() == 0:
        inspection.save(path, step)
    return inspection


def inspect_model(model: Decoder, batch: Batch) -> Inspection:
    """Depth weights and magnitudes of `model` on the real tokens of `batch`, one sequence at a time.

    Args:
      model: a decoder under any depth rule; one that is split over devices inside `parallel.use_mesh`.
      batch: arrays [B, T] as the data pipeline makes them; rows and tokens of padding (segment 0) do not count.
    """
    totals: dict[str, Any] = {}
    tokens = 0
    for row in range(len(batch["inputs"])):
        one = {key: np.asarray(value[row : row + 1]) for key, value in batch.items()}
        count = int((one["segment_ids"] > 0).sum())
        if count:
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), _jitted_sums()(model, one))
            totals = jax.tree.map(np.add, totals, sums) if totals else sums
            tokens += count
    plan = model.plan()
    sites = [f"{'MLP' if index % 2 else 'attention'} {index // 2 + 1}" for index in range(len(plan))]
    means = {
        key: _left_aligned([row / tokens for row in totals[key]]) for key in ("weights", "matrix") if key in totals
    }
    weights = means.get("weights")
    return Inspection(
        **{key: np.sqrt(totals[key] / (tokens * model.config.width)).astype(np.float32) for key in MAGNITUDES},
        depth_weights=weights,
        site_labels=(*sites, "readout"),
        source_labels=() if weights is None else _source_labels(model.config.depth.rule, sites, weights.shape[1]),
        mixing_matrix=means["matrix"],
        output_labels=("embedding", *sites),
    )


def depth_weights(model: Decoder, batch: Batch) -> Float[np.ndarray, "sites sources"] | None:
    """Mean weight of each source at each site (see `Inspection`); None for a rule without weights."""
    return inspect_model(model, batch).depth_weights


def magnitudes(model: Decoder, batch: Batch) -> dict[str, np.ndarray]:
    """Root mean squares by sublayer, as in `Inspection`: the arrays that `MAGNITUDES` names."""
    inspection = inspect_model(model, batch)
    return {key: getattr(inspection, key) for key in MAGNITUDES}


@functools.cache
def _jitted_sums() -> Callable:
    # A loop over the sublayers is a long program that runs a few times: on CPU, optimising it costs more than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(_sums, compiler_options=options)


def _sums(model: Decoder, row: Batch) -> dict[str, Any]:
    """Sums over real tokens: of squares [L or L+1], and of weights, an array [sources] for each site."""
    gradients, trace = output_gradients(model, row)
    real = row["segment_ids"] > 0
    arrays = {
        "output_rms": trace.outputs,
        "state_rms": trace.states,
        "gradient_rms": gradients,
        "input_rms": trace.inputs,
    }
    sums = {key: jnp.einsum("lbtd,bt->l", jnp.square(x.astype(jnp.float32)), real) for key, x in arrays.items()}
    for key, sites in (("weights", trace.weights), ("matrix", trace.matrix)):
        if sites is not None:
            sums[key] = tuple(jnp.einsum("nbt,bt->n", site, real) for site in sites)
    return sums


def _left_aligned(rows: list[np.ndarray]) -> np.ndarray:
    """One array, NaN right of the end of each row: column n is block n, complete or as its partial sum."""
    aligned = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for place, row in zip(aligned, rows, strict=True):
        place[: len(row)] = row
    return aligned


def _source_labels(rule: str, sites: list[str], count: int) -> tuple[str, ...]:
    # As many sources as sublayers, and the first: every output is a source of its own.
    outputs = sites if count == len(sites) + 1 else [f"block {block}" for block in range(1, count)]
    if rule == "muddformer":  # which reads states
        outputs = [f"after {site}" for site in sites]
    return ("null" if rule in ("delta", "delta_block") else "embedding", *outputs)
