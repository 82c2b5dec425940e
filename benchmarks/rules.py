"""Trains every depth rule from the same seed and prints what each came to: loss, time of a step, memory, parameters.

    python benchmarks/rules.py                                   # configs/tiny.py, 200 steps, every rule
    python benchmarks/rules.py --rules=residual,block --steps=50 --workdir=runs/two --config.model.width=64

Runs that are there already are resumed or left as they are. A rule that ends with a loss that is not finite, or that
did not come down, is named at the end, and the exit code is 1. One seed: differences are observations, not findings.
"""

import json
import math
import sys
from pathlib import Path

from absl import flags

from attnres_jax.analysis import Run, compare, inspect_run, is_inspected
from attnres_jax.cli import launch
from attnres_jax.config import load_config
from attnres_jax.depth import RULES
from attnres_jax.errors import ConfigError
from attnres_jax.training import enable_compilation_cache, retain_host_memory, train

CONFIG = flags.DEFINE_string("config", str(Path(__file__).parents[1] / "configs" / "tiny.py"), "Takes residual=RULE.")
STEPS = flags.DEFINE_integer("steps", 200, "Training steps.")
NAMES = flags.DEFINE_list("rules", list(RULES), "Depth rules; the first is the one the others are held against.")
WORKDIR = flags.DEFINE_string("workdir", "runs/rules", "Where the runs go, one folder a rule.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main(arguments: list[str], overrides: list[str]) -> int:
    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r}")
    if len(set(NAMES.value)) < len(NAMES.value):
        raise ConfigError(f"--rules={','.join(NAMES.value)} names a rule twice")
    retain_host_memory()
    overrides = [f"training.steps={STEPS.value}", *overrides]
    for name in NAMES.value:
        config, workdir = load_config(f"{CONFIG.value}:residual={name}", overrides), Path(WORKDIR.value) / name
        enable_compilation_cache(config.data)
        train(config, workdir)
        if not is_inspected(workdir):
            inspect_run(workdir)
    arms = compare([Path(WORKDIR.value) / name for name in NAMES.value]).arms
    runs = {name: arm.runs[0] for name, arm in zip(NAMES.value, arms, strict=True)}
    figures = []
    print(f"\n{'rule':18}{'first loss':>11}{'held-out':>10}{'step ms':>9}{'/ first':>9}{'MiB':>7}{'parameters':>12}")
    base = runs[NAMES.value[0]]
    for name, run in runs.items():
        first, ratio = float(run.train["loss"][0]), run.step_seconds / base.step_seconds
        print(
            f"{name:18}{first:11.4f}{run.final_loss:10.4f}{1000 * run.step_seconds:9.1f}{ratio:9.3f}"
            f"{run.peak_memory_bytes / 2**20:7.0f}{run.parameters:12,.0f}"
        )
        figures += [
            {"name": f"{name}/heldout_loss", "value": run.final_loss, "unit": "nats"},
            {"name": f"{name}/step_ratio", "value": ratio, "unit": "ratio"},
        ]
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")
    bad = [name for name, run in runs.items() if not is_down(run)]
    if bad:
        print(f"did not train: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def is_down(run: Run) -> bool:
    """Whether all losses are finite, and the last held-out loss is below the first training loss."""
    losses = [*run.train["loss"].tolist(), run.final_loss]
    return all(map(math.isfinite, losses)) and run.final_loss < losses[0]


if __name__ == "__main__":
    launch(main)
