"""Every depth rule and every ablation trains: 200 steps, everything finite, the loss down."""

import json
import subprocess

import pytest
from small_runs import ROOT
from training_runs import command, environment, history

from attnres_jax.config import load_config
from attnres_jax.depth import RULES
from attnres_jax.training import train

ABLATIONS = {
    "sigmoid": {"weights": "sigmoid"},
    "heads": {"heads": 4},
    "no_key_norm": {"key_norm": False},
    "window": {"window": 1},
    "scalars": {"query": "none"},
    "input_query": {"query": "input"},
    "recency": {"recency_bias": 2.0},
}


@pytest.mark.parametrize(
    "rule, options",
    [(rule, {}) for rule in RULES]
    + [pytest.param("block", options, marks=pytest.mark.slow, id=name) for name, options in ABLATIONS.items()],
)
def test_200_small_steps_bring_the_loss_down(rule, options, overrides, tmp_path):
    changes = ["training.steps=200", "training.eval_every=100", "training.checkpoint_every=200"]
    changes += [f"model.depth.{key}={value}" for key, value in options.items()]
    spec = f"{ROOT / 'configs' / 'tiny.py'}:residual={rule},block_size=2"
    config = load_config(spec, [*overrides, *changes])
    summary = train(config, tmp_path / "run")
    losses = [row["loss"] for row in history(tmp_path / "run") if row["kind"] == "train"]
    assert summary["status"] == "finished" and len(losses) == 200
    assert losses[0] > 5.4  # log 300 is 5.7
    assert summary["final_loss"] < losses[0] - 2


@pytest.mark.slow
def test_200_steps_of_the_tiny_config_with_every_rule(tmp_path):
    flags = [f"--workdir={tmp_path / 'rules'}", f"--json={tmp_path / 'figures.json'}"]
    # Here computing takes longer than compiling: XLA's own settings, not the quick ones of tests.
    optimised = environment() | {"XLA_FLAGS": ""}
    done = subprocess.run(command("benchmarks/rules.py", *flags), env=optimised, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {figure["name"]: figure["value"] for figure in json.loads((tmp_path / "figures.json").read_text())}
    assert all(figures[f"{rule}/heldout_loss"] < 6.6 for rule in RULES)
