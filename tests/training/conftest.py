"""A text, a configuration and a run that take seconds."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small_runs import ROOT, small_overrides
from training_runs import SETTINGS

from attnres_jax.config import Config, load_config
from attnres_jax.data import load_text, train_iterator
from attnres_jax.training import train
from attnres_jax.training.checkpoints import Checkpoints, abstract_state


@pytest.fixture(scope="session")
def overrides(tmp_path_factory) -> list[str]:
    """What makes configs/tiny.py small, as on the command line."""
    return small_overrides(tmp_path_factory, SETTINGS)


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


@pytest.fixture
def poisoned_run(stopped_run, config) -> Path:
    """The stopped run with another checkpoint, of step 15, whose parameters overflow in the step after it."""
    batches = train_iterator(load_text(config.data, config.model.vocab_size), config.data, seed=config.seed)
    with Checkpoints(stopped_run / "checkpoints", keep=9) as checkpoints:
        state = checkpoints.restore(12, abstract_state(config), batches)
        huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e30), state.model.sublayers["swiglu"])
        state.model.sublayers["swiglu"] = huge
        checkpoints.save(15, state, batches, checkpoints.record(12))
    return stopped_run
