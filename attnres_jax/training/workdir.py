"""The run's directory: claimed by one process, made by one configuration, written so that a kill leaves it whole."""

import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import jax

from attnres_jax.config import Config, flatten, read_config
from attnres_jax.errors import UserError

IRRELEVANT = ("data.cache_dir", "mesh.", "pipeline.", "training.process_timeout")
"""Keys, or the beginnings of keys, that change no number of a run, mesh and pipeline none but by rounding: a run may go
on with others, on other devices than it was begun on."""


class WorkdirError(UserError):
    """A directory that cannot hold this run."""


def claim(workdir: Path, config: Config) -> contextlib.AbstractContextManager:
    """Makes the directory this run's own, or finds that it is; until the result is closed nobody else can claim it.

    A run that ended before its first step and first row can be asked for again by another configuration.

    Raises:
      WorkdirError: one line, if it is a file, cannot be written, holds unrelated files, is in use, or was made by
        another configuration.
    """
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"--workdir={workdir} is a file; name a directory")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _refuse_unrelated(workdir)
        lock = _lock(workdir)
        path = workdir / "config.json"
        differing = _differing(read_config(path), config) if path.exists() else []
        if differing and _has_begun(workdir):
            raise WorkdirError(
                f"--workdir={workdir} was made by another config: {'; '.join(differing)}; "
                "name another directory or ask for the same config"
            )
        if differing or not path.exists():
            write_json(path, dataclasses.asdict(config))
    except OSError as error:
        raise WorkdirError(f"--workdir={workdir} cannot be written: {error.strerror} ({error.filename})") from error
    return lock


def write_json(path: Path, value: Any) -> None:
    """Writes a file that holds either what it held or the new value, whenever the process dies."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for text."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _refuse_unrelated(workdir: Path) -> None:
    others = sorted(path.name for path in workdir.iterdir() if path.name not in ("lock", "config.json.tmp"))
    if others and "config.json" not in others:
        raise WorkdirError(
            f"--workdir={workdir} holds no run but other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}); "
            "name an empty or a new directory"
        )


def _lock(workdir: Path) -> contextlib.AbstractContextManager:
    """An open file that the kernel unlocks when the process ends, however it ends."""
    file = (workdir / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkdirError(f"--workdir={workdir} is in use by another process; wait for it or name another") from None
    except OSError:
        pass  # a file system without locks
    return file


def _has_begun(workdir: Path) -> bool:
    """Whether there is anything of the run that a new beginning would lose: a row or a checkpoint."""
    rows = workdir / "metrics.jsonl"
    return (rows.exists() and rows.stat().st_size > 0) or any((workdir / "checkpoints").glob("[0-9]*"))


def _differing(there: Config, asked: Config) -> list[str]:
    """What makes them two runs, a phrase each."""
    then, now = flatten(there), flatten(asked)
    keys = [key for key in now if then[key] != now[key] and not key.startswith(IRRELEVANT)]
    return [f"{key}={then[key]!r} there, {now[key]!r} asked" for key in keys]
