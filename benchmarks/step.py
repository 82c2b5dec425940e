"""What a depth rule costs: time and memory of a training step, and of a forward pass, over the residual baseline's.

    python benchmarks/step.py                              # width 512, 16 layers, N=8, 1024 tokens, float32
    python benchmarks/step.py --remat=full --width=1024
    python benchmarks/step.py --blocks=4,8,16 --pairs=0    # memory and compile time alone

The arms run in turn, a round each, and every figure of an arm is compared with the baseline's of the same round: the
ratio is the median over rounds. `plain` is the residual baseline as an ordinary `lax.scan` differentiated by JAX: it
shows that the baseline everything is compared with is not a slow one.
"""

import dataclasses
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from attnres_jax.cli import launch
from attnres_jax.config import Config, DepthConfig, ModelConfig, validate_model
from attnres_jax.errors import ConfigError
from attnres_jax.models import Decoder
from attnres_jax.training import TrainState, learning_rate_schedule, make_optimizer, make_train_step, retain_host_memory

ARMS = flags.DEFINE_list(
    "arms", ["residual", "plain", "block", "full", "rms_block"], "Depth rules; the first is the baseline."
)
WIDTH = flags.DEFINE_integer("width", 512, "Model width.", lower_bound=1)
LAYERS = flags.DEFINE_integer(
    "layers", 16, "Transformer layers; with several --blocks, those of 8 blocks.", lower_bound=1
)
BLOCKS = flags.DEFINE_list("blocks", ["8"], "Blocks N of the block rule, a table each; layers a block stay the same.")
TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens in a step, as one row.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
REMAT = flags.DEFINE_string("remat", "none", "What a block keeps for its backward pass: none, dots, full.")
PAIRS = flags.DEFINE_integer("pairs", 8, "Rounds; 0 measures memory and compile time alone.")
RETAIN = flags.DEFINE_bool("retain_memory", True, "Keep freed memory, as train.py does: see retain_host_memory.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

COLUMNS = (  # key, heading, unit, format
    ("step_seconds", "step s", "s", "9.3f"),
    ("step_ratio", "ratio", "ratio", "8.3f"),
    ("processor_ratio", "cpu ratio", "ratio", "11.3f"),
    ("forward_seconds", "forward s", "s", "11.3f"),
    ("forward_ratio", "ratio", "ratio", "8.3f"),
    ("temp_bytes", "temp bytes", "bytes", "15,d"),
    ("extra_activations", "+ [B,T,D]", "[B, T, D]", "11.1f"),
    ("compile_seconds", "compile s", "s", "11.1f"),
)


class PlainScan(Decoder):
    """The residual baseline with nothing of the project's scan: `lax.scan` over layers, differentiated by JAX."""

    def with_reports(self, tokens, segment_ids=None, positions=None):
        """Next-token logits, and no reports."""
        context = self.context(tokens, segment_ids, positions)

        def layer(stream, sublayers):
            stream = stream + sublayers["gqa"](stream, context)
            return stream + sublayers["swiglu"](stream, context), None

        if self.config.remat == "full":
            layer = jax.checkpoint(layer, prevent_cse=False)
        stream, _ = jax.lax.scan(layer, self.embedding(tokens), dict(self.sublayers.items()))
        return self.logits(stream), None


class Arm(NamedTuple):
    """A compiled arm and what was measured of it."""

    step: jax.stages.Compiled
    forward: jax.stages.Compiled | None
    new_state: Callable[[], TrainState]
    step_seconds: list[float]
    processor_seconds: list[float]
    forward_seconds: list[float]
    compile_seconds: float


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments or overrides:
        raise ConfigError(f"unexpected argument {(arguments or overrides)[0]!r}")
    counts = block_counts()
    per_block = layers_of_a_block(8 if len(counts) > 1 else counts[0])
    if RETAIN.value:
        retain_host_memory()
    figures = []
    for blocks in counts:
        figures += compare(blocks, per_block)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def block_counts() -> list[int]:
    """--blocks."""
    wrong = [text for text in BLOCKS.value if not text.isdecimal() or not int(text)]
    if wrong or not BLOCKS.value:
        raise ConfigError(f"--blocks={','.join(BLOCKS.value)} are no numbers of blocks, as in 8 or 4,8,16")
    return [int(text) for text in BLOCKS.value]


def layers_of_a_block(blocks: int) -> int:
    """Of a stack of --layers."""
    per_block, rest = divmod(LAYERS.value, blocks)
    if rest or not per_block:
        raise ConfigError(f"--layers={LAYERS.value} is not divisible into {blocks} blocks of whole layers")
    return per_block


def compare(blocks: int, layers_per_block: int) -> list[dict]:
    """Measures all arms at one depth and prints their table."""
    layers, versions = blocks * layers_per_block, f"Python {platform.python_version()}, jax {jax.__version__}"
    print(
        f"\nwidth {WIDTH.value}, {layers} layers, N={blocks}, {TOKENS.value} tokens, {DTYPE.value}, remat {REMAT.value}"
    )
    print(f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores), {platform.machine()}, {versions}")
    arms = {name: build(name, layers, 2 * layers_per_block) for name in ARMS.value}
    for _ in range(PAIRS.value):
        for arm in arms.values():
            measure(arm)
    print(" " * 10 + "".join(heading.rjust(int(re.match(r"\d+", form)[0])) for _, heading, _, form in COLUMNS))
    figures = []
    for name, arm in arms.items():
        values = summarise(arm, arms[ARMS.value[0]])
        cells = (format(values[key], form) if key in values else "" for key, _, _, form in COLUMNS)
        print(f"{name:10}" + "".join(cells))
        figures += [
            {"name": f"N{blocks}/{name}/{key}", "value": values[key], "unit": unit}
            for key, _, unit, _ in COLUMNS
            if key in values
        ]
    return figures


def summarise(arm: Arm, base: Arm) -> dict[str, float]:
    """An arm's row; `extra_activations` is its temporary memory beyond the baseline's, in arrays [B, T, D]."""
    temp, base_temp = (each.step.memory_analysis().temp_size_in_bytes for each in (arm, base))
    values = {"temp_bytes": temp, "compile_seconds": arm.compile_seconds}
    values["extra_activations"] = (temp - base_temp) / (TOKENS.value * WIDTH.value * jnp.dtype(DTYPE.value).itemsize)
    if arm.step_seconds:
        values["step_seconds"] = float(np.median(arm.step_seconds))
        values["step_ratio"] = float(np.median(np.divide(arm.step_seconds, base.step_seconds)))
        values["processor_ratio"] = float(np.median(np.divide(arm.processor_seconds, base.processor_seconds)))
        values["forward_seconds"] = float(np.median(arm.forward_seconds))
        values["forward_ratio"] = float(np.median(np.divide(arm.forward_seconds, base.forward_seconds)))
    return values


def model_config_of(name: str, layers: int, block_size: int) -> ModelConfig:
    """The model of an arm."""
    depth = DepthConfig(rule="residual" if name == "plain" else name, block_size=block_size)
    model_config = ModelConfig(
        vocab_size=256,
        width=WIDTH.value,
        num_layers=layers,
        num_heads=max(1, WIDTH.value // 64),
        num_kv_heads=max(1, WIDTH.value // 64),
        mlp_width=WIDTH.value * 11 // 4,
        max_length=TOKENS.value,
        dtype=DTYPE.value,
        remat=REMAT.value,
        depth=depth,
    )
    validate_model(model_config)
    return model_config


def make_step(name: str, model_config: ModelConfig):
    """The project's own training step for one depth rule, and what makes its first state."""
    config = dataclasses.replace(Config(), model=model_config)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(config.training, optimizer, schedule)

    def new_state():
        model = (PlainScan if name == "plain" else Decoder)(model_config, rngs=nnx.Rngs(0))
        return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jax.random.key(0))

    return step, new_state


def lower(name: str, layers: int, block_size: int, device: jax.Device | None = None) -> jax.stages.Lowered:
    """The step traced for `device`, which need not be there; None: the default one."""
    step, new_state = make_step(name, model_config_of(name, layers, block_size))
    arguments = jax.eval_shape(lambda: (new_state(), make_batch(), jnp.ones(256, jnp.int32)))
    if device is not None:
        place = jax.sharding.SingleDeviceSharding(device)
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    return step.lower(*arguments)


def build(name: str, layers: int, block_size: int) -> Arm:
    """Compiles an arm."""
    started = time.perf_counter()
    compiled = lower(name, layers, block_size).compile()
    compile_seconds = time.perf_counter() - started
    new_state = jax.jit(make_step(name, model_config_of(name, layers, block_size))[1])
    if not PAIRS.value:
        return Arm(compiled, None, new_state, [], [], [], compile_seconds)
    model, tokens = jax.eval_shape(lambda: (new_state().model, make_batch()["inputs"]))
    forward = jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).compile()
    return Arm(compiled, forward, new_state, [], [], [], compile_seconds)


def make_batch() -> dict[str, jax.Array]:
    """One row of random tokens."""
    tokens = jax.random.randint(jax.random.key(1), (1, TOKENS.value + 1), 0, 256)
    ones = jnp.ones((1, TOKENS.value), jnp.int32)
    positions = jnp.arange(TOKENS.value, dtype=jnp.int32)[None]
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": positions}
    return batch | {"weights": ones.astype(jnp.float32)}


def measure(arm: Arm) -> None:
    """The first step of a run and three forward passes; no more than one arm's state is there at a time."""
    state, batch, token_bytes = jax.block_until_ready((arm.new_state(), make_batch(), jnp.ones(256, jnp.int32)))
    started, processor = time.perf_counter(), time.process_time()
    state, _ = jax.block_until_ready(arm.step(state, batch, token_bytes))
    arm.step_seconds.append(time.perf_counter() - started)
    arm.processor_seconds.append(time.process_time() - processor)
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(arm.forward(state.model, batch["inputs"]))
        arm.forward_seconds.append(time.perf_counter() - started)


if __name__ == "__main__":
    launch(main)
