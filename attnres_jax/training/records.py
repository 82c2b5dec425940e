"""What a run writes about itself: metrics.jsonl and TensorBoard while it goes on, summary.json when it stops."""

import contextlib
import datetime
import json
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from attnres_jax.config import Config
from attnres_jax.training.workdir import write_json, write_text

PACKAGES = ("attnres_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
KINDS = ("train", "eval")
"""Of rows."""


class Records(contextlib.AbstractContextManager):
    """Rows of metrics.jsonl, each also in TensorBoard; process 0 writes, the others only pass by."""

    def __init__(self, workdir: Path, start: int):
        """Goes on from step `start`: rows of later steps, left by a run that was killed, are dropped."""
        self.path = workdir / "metrics.jsonl"
        self._file = None
        if jax.process_index() == 0:
            cut_rows(self.path, start)
            self._file = self.path.open("a")
            # Files are named by the second: the suffix keeps apart two processes within one.
            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}"
            )

    def __exit__(self, *_: Any) -> None:
        if self._file:
            self._file.close()
            self._tensorboard.close()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row (`kind`, `step`, numbers), on disk before this returns as far as the process is concerned."""
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for key, value in row.items():
                if key not in ("kind", "step"):
                    self._tensorboard.add_scalar(key if "/" in key else f"{row['kind']}/{key}", value, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl."""
    return rows_and_gaps(path)[0]


def rows_and_gaps(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The whole rows of a metrics.jsonl, and the numbers of lines between them that are none; a missing file is empty.

    A torn last line is how a killed run ends, and no gap.
    """
    rows, broken = [], []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = row["kind"] in KINDS and int(row["step"]) >= 0
        except (ValueError, KeyError, TypeError):
            whole = False
        if whole:
            rows.append(row)
        else:
            broken.append(number)
    return rows, [number for number in broken if number < len(lines)]


def cut_rows(path: Path, step: int) -> None:
    """Drops the rows after `step`."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_summary(
    workdir: Path,
    config: Config,
    *,
    status: str,
    steps: int,
    tokens: int,
    parameters: int,
    flops_per_token: int,
    **measured: Any,
) -> dict[str, Any]:
    """Writes summary.json from the rows of metrics.jsonl and returns it; what was never measured is None."""
    rows = read_rows(workdir / "metrics.jsonl")
    training = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "eval"]

    def median(key: str) -> float | None:
        return statistics.median(row[key] for row in training) if training else None

    devices = jax.devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else f"cpu ({os.cpu_count()} cores)"
    summary = {
        "name": config.name,
        "rule": config.model.depth.rule,
        "seed": config.seed,
        "status": status,
        "steps": steps,
        "tokens": tokens,
        "parameters": parameters,
        "final_loss": heldout[-1]["loss"] if heldout else None,
        "best_loss": min((row["loss"] for row in heldout), default=None),
        "final_bits_per_byte": heldout[-1]["bits_per_byte"] if heldout else None,
        "best_bits_per_byte": min((row["bits_per_byte"] for row in heldout), default=None),
        "tokens_per_second": median("tokens_per_second"),
        "step_seconds": median("step_seconds"),
        **measured,
        "flops_per_token": flops_per_token,
        "device": kind if len(devices) == 1 else f"{len(devices)} x {kind}",
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)
    return summary


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that has stopped at least once."""
    path = workdir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None
