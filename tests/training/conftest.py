"""A text, a configuration and a run that take seconds."""

import shutil
from pathlib import Path

import pytest
from training_runs import ROOT, SETTINGS

from attnres_jax.config import Config, load_config
from attnres_jax.training import train


@pytest.fixture(scope="session")
def overrides(tmp_path_factory) -> list[str]:
    """What makes configs/tiny.py small, as on the command line."""
    folder = tmp_path_factory.mktemp("text")
    for document in range(12):
        lines = (f"document {document} says {document * line * 7919 % 1000} in line {line}\n" for line in range(40))
        (folder / f"{document}.txt").write_text("".join(lines))
    settings = SETTINGS | {"data.files": folder / "*.txt", "data.cache_dir": tmp_path_factory.mktemp("cache")}
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def config(overrides) -> Config:
    return load_config(str(ROOT / "configs/tiny.py"), overrides)


@pytest.fixture(scope="session")
def finished_run(config, tmp_path_factory) -> Path:
    """A run with a checkpoint at every fourth step; not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(config, workdir)
    return workdir


@pytest.fixture
def stopped_run(finished_run, tmp_path) -> Path:
    """The same run as a kill could have left it: the newest checkpoint is of step 12, a row is torn in the middle."""
    workdir = tmp_path / "stopped"
    shutil.copytree(finished_run, workdir)
    (workdir / "summary.json").unlink()
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > 12:
            shutil.rmtree(checkpoint)
    rows = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(rows[:14]) + rows[14][:40])
    return workdir
