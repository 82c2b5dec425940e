"""Runs on disk: what a workdir holds, read whole and tolerant of a file that was being written when the run died."""

import dataclasses
import functools
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnres_jax.config import Config, read_config
from attnres_jax.errors import UserError
from attnres_jax.training.records import KINDS, rows_and_gaps


class RunError(UserError):
    """A workdir that cannot be compared; the message names it and what it lacks."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training run. Losses are nats a token, rates are of the training loop alone."""

    workdir: Path
    config: Config
    train: Mapping[str, np.ndarray]
    """Columns of the train rows, sorted by step; NaN where a row lacks the key."""
    heldout: Mapping[str, np.ndarray]
    """Columns of the eval rows, at least one row."""
    summary: Mapping[str, Any]
    """Empty until the run has ended."""
    inspection: Mapping[str, np.ndarray]
    """Arrays of inspection.npz; empty if there is none."""
    notes: tuple[str, ...]
    """What is incomplete or unreadable, a sentence each."""

    @functools.cached_property
    def diagnostics(self) -> dict[str, np.ndarray]:
        """Depth diagnostics of the R train rows with them: step, tokens, depth/spike [R], others by depth [R, L].

        Empty where none were measured.
        """
        if "depth/spike" not in self.train:
            return {}
        measured = np.isfinite(self.train["depth/spike"])
        found = {key: self.train[key][measured] for key in ("step", "tokens", "depth/spike")}
        elements: dict[str, dict[int, np.ndarray]] = {}
        for key, column in self.train.items():
            name, _, index = key.rpartition("/")
            if index.isdecimal():
                elements.setdefault(name, {})[int(index)] = column[measured]
        return found | {name: np.stack([own[i] for i in sorted(own)], 1) for name, own in elements.items()}

    @property
    def final_loss(self) -> float:
        """Held-out loss of the last evaluation."""
        return float(self.heldout["loss"][-1])

    @property
    def best_loss(self) -> float:
        """Lowest held-out loss of any evaluation; NaN if none is finite."""
        return _minimum(self.heldout["loss"])

    @property
    def final_bits_per_byte(self) -> float:
        """Held-out bits per byte of the last evaluation."""
        return float(self.heldout["bits_per_byte"][-1])

    @property
    def best_bits_per_byte(self) -> float:
        """Lowest held-out bits per byte of any evaluation; NaN if none is finite."""
        return _minimum(self.heldout["bits_per_byte"])

    @property
    def tokens(self) -> int:
        """Tokens trained on when the last evaluation was made."""
        return int(self.heldout["tokens"][-1])

    @property
    def tokens_per_second(self) -> float:
        """Median training throughput; NaN if nothing was logged."""
        return self._number("tokens_per_second", self.train.get("tokens_per_second"))

    @property
    def step_seconds(self) -> float:
        """Median time of a step; NaN if nothing was logged."""
        return self._number("step_seconds", self.train.get("step_seconds"))

    @property
    def compile_seconds(self) -> float:
        """Time to compile the step; NaN until the run has ended."""
        return self._number("compile_seconds")

    @property
    def peak_memory_bytes(self) -> float:
        """Peak memory of the run; NaN if unknown."""
        return self._number("peak_memory_bytes")

    @property
    def parameters(self) -> float:
        """Number of parameters; NaN until the run has ended."""
        return self._number("parameters")

    def _number(self, key: str, column: np.ndarray | None = None) -> float:
        value = self.summary.get(key)
        if value is not None:
            return float(value)
        return math.nan if column is None or not np.isfinite(column).any() else float(np.nanmedian(column))


def read_run(workdir: str | Path) -> Run:
    """Reads a workdir: config.json, metrics.jsonl and, where they are there, summary.json and inspection.npz.

    Lines of metrics.jsonl that are not whole are skipped, and of two rows of one step the later counts (a resumed run
    repeats the steps after its last checkpoint).

    Raises:
      RunError: if the workdir is missing, or holds no held-out evaluation yet.
      ConfigError: if its config.json is missing or invalid.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise RunError(
            f"workdir '{workdir}' does not exist; train one with: python train.py --config=... --workdir={workdir}"
        )
    config = read_config(workdir / "config.json")
    rows, notes = _read_metrics(workdir / "metrics.jsonl")
    if not rows["eval"]:
        state = f"no held-out evaluation yet (step {max(rows['train'])})" if rows["train"] else "no metrics yet"
        raise RunError(f"workdir '{workdir}' has {state}; compare it once it has trained for training.eval_every steps")
    summary = _read_summary(workdir / "summary.json", notes)
    inspection = _read_inspection(workdir / "inspection.npz", notes)
    # An interrupted run has trained past its last row, and one that was killed after it went on past its summary.
    done, steps = max([*rows["eval"], *rows["train"], summary.get("steps", 0)]), config.training.steps
    if "step" in inspection and inspection["step"] != done:
        notes.append(f"{workdir} was inspected at step {inspection['step']} of the {done} that it has trained.")
    if summary.get("status", "unfinished") != "finished" or done < steps:
        notes.append(f"{workdir} is {summary.get('status', 'unfinished')}: step {done} of {steps}.")
    return Run(
        workdir, config, _columns(rows["train"]), _columns(rows["eval"]), summary, inspection, notes=tuple(notes)
    )


def is_inspected(workdir: Path | str) -> bool:
    """Whether the inspection.npz of a run is of the step at which it ended; else `inspect_run` makes one that is."""
    step = _read_inspection(Path(workdir) / "inspection.npz", []).get("step")
    summary = _read_summary(Path(workdir) / "summary.json", [])
    return step is not None and int(step) == summary.get("steps")


def _read_metrics(path: Path) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """Rows by kind and step, and what had to be skipped."""
    rows: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    read, gaps = rows_and_gaps(path)
    for row in read:
        rows[row["kind"]][int(row["step"])] = row
    return rows, [f"{path}: line {', '.join(map(str, gaps))} is not a whole row and was skipped."] if gaps else []


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        notes.append(f"{path} is not whole and was ignored.")
        return {}


def _read_inspection(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        notes.append(f"{path} is not whole and was ignored.")
        return {}


def _columns(rows: dict[int, dict[str, Any]]) -> dict[str, np.ndarray]:
    ordered = [rows[step] for step in sorted(rows)]
    keys = {key for row in ordered for key, value in row.items() if isinstance(value, (int, float))}
    keys |= {"step", "loss", "bits_per_byte", "tokens", "flops", "seconds"}
    return {key: np.array([_number(row.get(key)) for row in ordered], np.float64) for key in sorted(keys)}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _minimum(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.min()) if finite.size else math.nan
