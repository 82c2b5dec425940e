"""What the depth diagnostics cost: one measurement over the training steps between two (`metrics.every`).

    python benchmarks/diagnostics.py                          # configs/tiny.py, every 50 steps
    python benchmarks/diagnostics.py --rules=block --config.model.width=512 --config.model.num_layers=16

Steps and measurements alternate in one process; the overhead is the ratio of their medians, divided by `--every`.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnres_jax.cli import launch
from attnres_jax.config import MetricsConfig, load_config
from attnres_jax.errors import ConfigError
from attnres_jax.training import learning_rate_schedule, make_optimizer, make_train_step, retain_host_memory
from attnres_jax.training.diagnostics import DepthDiagnostics
from attnres_jax.training.state import new_state

CONFIG = flags.DEFINE_string("config", str(Path(__file__).parents[1] / "configs" / "tiny.py"), "Takes residual=RULE.")
NAMES = flags.DEFINE_list("rules", ["residual", "block", "full"], "Depth rules.")
EVERY = flags.DEFINE_integer("every", MetricsConfig().every, "Steps between two measurements.")
ROUNDS = flags.DEFINE_integer("rounds", 10, "Measurements, with four steps before each.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments:
        raise ConfigError(f"unexpected argument {arguments[0]!r}")
    retain_host_memory()
    print(f"{'rule':18}{'step s':>9}{'measurement s':>15}{f'overhead, every {EVERY.value}':>22}")
    figures = []
    for name in NAMES.value:
        step, measurement = times(load_config(f"{CONFIG.value}:residual={name}", overrides))
        overhead = measurement / (EVERY.value * step)
        print(f"{name:18}{step:9.4f}{measurement:15.4f}{overhead:22.2%}")
        figures.append({"name": f"{name}/overhead", "value": overhead, "unit": "ratio"})
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def times(config) -> tuple[float, float]:
    """Median seconds of a training step and of a measurement."""
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    train_step, state = make_train_step(config.training, optimizer, schedule), new_state(config, optimizer)
    diagnostics = DepthDiagnostics(MetricsConfig(depth=True, every=EVERY.value))
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
    batch = {"inputs": tokens, "targets": tokens, "segment_ids": jnp.ones(shape, jnp.int32)}
    batch["positions"] = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    batch["weights"] = jnp.ones(shape, jnp.float32)
    token_bytes = jnp.ones(config.model.vocab_size, jnp.int32)
    steps, measurements = [], []
    for _ in range(1 + ROUNDS.value):
        for _ in range(4):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, batch, token_bytes))
            steps.append(time.perf_counter() - started)
        started = time.perf_counter()
        jax.block_until_ready(diagnostics.measure(state.model, batch))
        measurements.append(time.perf_counter() - started)
    return float(np.median(steps[4:])), float(np.median(measurements[1:]))  # the first round compiles


if __name__ == "__main__":
    launch(main)
