"""What the chunkwise delta rule of KDA saves over the token recurrence: time and memory, forward and backward.

    python benchmarks/kda.py                       # 2048 tokens, 4 heads of 64, float32
    python benchmarks/kda.py --chunk=128 --rounds=0
    python benchmarks/kda.py --decays=100          # too strong to be taken from a tile's middle
    python benchmarks/kda.py --lower_bound=-5      # beside it as under K3's bounded gate: one form is compiled
    python benchmarks/kda.py --retain_host_memory  # with the memory that the trainer on CPU has, not glibc's default

All forms run in turn, a round each; a ratio is that of the medians over the rounds. Forward and backward is a
`jax.vjp` with given cotangents of all reads and of the final state, by all six inputs. Memory is what the compiled
program needs beside its arguments and results.
"""

import functools
import itertools
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnres_jax.cli import launch
from attnres_jax.errors import ConfigError
from attnres_jax.layers import delta_rule_chunkwise, delta_rule_recurrence
from attnres_jax.training import retain_host_memory

TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens of the row.")
HEADS = flags.DEFINE_integer("heads", 4, "Heads.")
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of keys and of values.")
CHUNK = flags.DEFINE_integer("chunk", None, "Tokens of a chunk; by default as the width of keys wants it.")
GROUP = flags.DEFINE_integer("group", None, "Chunks worked on at a time; by default as the cache wants it.")
DECAYS = flags.DEFINE_float("decays", 1.0, "Factor of the log decays that an untrained layer has.")
LOWER_BOUND = flags.DEFINE_float("lower_bound", None, "Also the chunkwise form that is told this bound of log decays.")
ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds; 0 measures memory and compile time alone.")
RETAIN = flags.DEFINE_boolean("retain_host_memory", False, "Keep freed memory as the trainer does.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

KINDS = ("forward", "both")


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments or overrides:
        raise ConfigError(f"unexpected argument {(arguments or overrides)[0]!r}")
    if RETAIN.value:
        retain_host_memory()
    chunkwise = functools.partial(delta_rule_chunkwise, chunk=CHUNK.value, group=GROUP.value)
    forms = {"recurrence": delta_rule_recurrence, "chunkwise": chunkwise}
    if LOWER_BOUND.value is not None:
        forms["bounded"] = functools.partial(chunkwise, lower_bound=LOWER_BOUND.value)
    arguments = make_arguments()
    smallest = float(arguments[0][3].min())
    if LOWER_BOUND.value is not None and smallest < LOWER_BOUND.value:
        raise ConfigError(f"--lower_bound={LOWER_BOUND.value} is above the smallest log decay; at most {smallest:.3f}")
    print(f"{TOKENS.value} tokens, {HEADS.value} heads of {HEAD_DIM.value}, float32")
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    print(f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores), {platform.machine()}, {versions}")
    passes, compiling, figures = {}, {}, []
    for name, form in forms.items():
        for kind, function in (("both", forward_and_backward(form)), ("forward", lambda x, _, form=form: form(*x))):
            started = time.perf_counter()
            passes[name, kind] = jax.jit(function).lower(*arguments).compile()
            compiling[name, kind] = time.perf_counter() - started
            figures.append((f"{name}/{kind}/compile", compiling[name, kind], "s"))
    seconds, processor = measure(passes, arguments)
    print(
        f"{'':12}{'forward ms':>12}{'+ backward ms':>15}{'processor ms':>14}"
        f"{'bytes a token':>15}{'forward alone':>15}{'compile s':>11}"
    )
    for name in forms:
        memory = {kind: passes[name, kind].memory_analysis().temp_size_in_bytes / TOKENS.value for kind in KINDS}
        times = {kind: 1e3 * np.median(seconds[name, kind]) if ROUNDS.value else np.nan for kind in KINDS}
        busy = 1e3 * np.median(processor[name, "both"]) if ROUNDS.value else np.nan
        print(
            f"{name:12}{times['forward']:12.2f}{times['both']:15.2f}{busy:14.2f}"
            f"{memory['both']:15,.0f}{memory['forward']:15,.0f}{compiling[name, 'both']:11.1f}"
        )
        figures += [(f"{name}/{kind}/temp_bytes", memory[kind], "bytes/token") for kind in KINDS]
        if ROUNDS.value:
            figures += [(f"{name}/{kind}/time", times[kind], "ms") for kind in KINDS]
            figures.append((f"{name}/both/processor_time", busy, "ms"))
    if ROUNDS.value:
        for name, kind in itertools.product(list(forms)[1:], KINDS):
            ratio = np.median(seconds["recurrence", kind]) / np.median(seconds[name, kind])
            print(f"{name} is {ratio:.1f}x as fast: {kind}")
            figures.append((f"{name}/{kind}/speedup", ratio, "ratio"))
    if JSON.value:
        named = [{"name": name, "value": float(value), "unit": unit} for name, value, unit in figures]
        Path(JSON.value).write_text(json.dumps(named, indent=1) + "\n")


def make_arguments() -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array]]:
    """Unit queries and keys, decays as an untrained Kimi Linear layer has them; cotangents of what comes out."""
    row, heads, width = (1, TOKENS.value), HEADS.value, HEAD_DIM.value
    keys = jax.random.split(jax.random.key(0), 8)
    normal = [jax.random.normal(key, (*row, heads, width)) for key in keys[:3]]
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in normal[:2])
    step = jnp.exp(jax.random.uniform(keys[3], (heads, width), minval=np.log(1e-3), maxval=np.log(1e-1)))
    rate = DECAYS.value * jnp.linspace(1, 16, heads)[:, None]
    log_decay = jnp.broadcast_to(-rate * step, normal[0].shape)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (*row, heads)))
    state, state_bar = (jax.random.normal(key, (1, heads, width, width)) for key in keys[5:7])
    return (q, k, normal[2], log_decay, beta, state), (jax.random.normal(keys[7], normal[2].shape), state_bar)


def forward_and_backward(form):
    """What comes out, and the cotangents of the inputs."""

    def both(inputs, cotangents):
        out, pullback = jax.vjp(form, *inputs)
        return out, pullback(cotangents)

    return both


def measure(passes: dict, arguments: tuple) -> tuple[dict, dict]:
    """Seconds, and processor seconds of all threads, of every pass in every round.

    In a round a pass runs twice, and the second time counts: beside the first the kernel may still take back what the
    pass before has freed, 400 MB after the recurrence.
    """
    seconds, processor = {key: [] for key in passes}, {key: [] for key in passes}
    for _ in range(ROUNDS.value):
        for key, compiled in passes.items():
            jax.block_until_ready(compiled(*arguments))
            started, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(*arguments))
            seconds[key].append(time.perf_counter() - started)
            processor[key].append(time.process_time() - busy)
    return seconds, processor


if __name__ == "__main__":
    launch(main)
