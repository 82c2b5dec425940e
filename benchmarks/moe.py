"""Time and memory of the expert function's implementations, forward and with its gradients.

    python benchmarks/moe.py                                # 16 experts, top-2, 4096 rows, 512 x 512, float32
    python benchmarks/moe.py --experts=64 --top=8 --json=moe.json

Rows are tokens times experts per token. Two things are measured: `experts`, the whole gated layer with sorting and the
weighted sum, and `product`, one grouped matmul of sorted rows, which has no dense implementation. The implementations
run in turn, a round each; a ratio is that of the medians over rounds, to `sorted`. Choices are random, so that experts
have unequal rows.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from attnres_jax.cli import launch
from attnres_jax.errors import ConfigError
from attnres_jax.layers.experts import experts, grouped_matmul
from attnres_jax.training import retain_host_memory

EXPERTS = flags.DEFINE_integer("experts", 16, "Experts.", lower_bound=1)
TOP = flags.DEFINE_integer("top", 2, "Experts of a token.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 4096, "Rows: tokens times --top.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 512, "Model width.", lower_bound=1)
HIDDEN = flags.DEFINE_integer("hidden", 512, "Width of an expert.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
ROUNDS = flags.DEFINE_integer("rounds", 11, "Rounds.", lower_bound=1)
RETAIN = flags.DEFINE_bool("retain_memory", True, "Keep freed memory, as train.py does: see retain_host_memory.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments or overrides:
        raise ConfigError(f"unexpected argument {(arguments or overrides)[0]!r}")
    if ROWS.value % TOP.value:
        raise ConfigError(f"--rows={ROWS.value} is not divisible by --top={TOP.value}")
    if TOP.value > EXPERTS.value:
        raise ConfigError(f"--top={TOP.value} is more than --experts={EXPERTS.value}")
    if RETAIN.value:
        retain_host_memory()
    device = f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores), {platform.machine()}"
    print(f"{EXPERTS.value} experts, top-{TOP.value}, {ROWS.value} rows ({ROWS.value // TOP.value} tokens), ", end="")
    print(f"{WIDTH.value} x {HIDDEN.value}, {DTYPE.value}, {ROUNDS.value} rounds")
    print(f"{device}, Python {platform.python_version()}, jax {jax.__version__}")
    figures = []
    for what, functions in (("experts", whole_layers()), ("product", products())):
        figures += compare(what, functions)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def arrays() -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """(tokens, choice, weights, kernels), all random."""
    tokens, keys = ROWS.value // TOP.value, jax.random.split(jax.random.key(0), 6)
    order = jax.random.uniform(keys[0], (tokens, EXPERTS.value))
    shapes = [(EXPERTS.value, *shape) for shape in [(WIDTH.value, HIDDEN.value)] * 2 + [(HIDDEN.value, WIDTH.value)]]
    kernels = [
        (jax.random.normal(key, shape) / shape[1] ** 0.5).astype(DTYPE.value)
        for key, shape in zip(keys[1:4], shapes, strict=True)
    ]
    x = jax.random.normal(keys[4], (tokens, WIDTH.value)).astype(DTYPE.value)
    return x, jax.lax.top_k(order, TOP.value)[1], jax.random.uniform(keys[5], (tokens, TOP.value)), kernels


def whole_layers() -> dict[str, tuple[Callable, tuple]]:
    """The expert function by each implementation, and its arguments."""
    x, indices, weights, kernels = arrays()

    def function(x, weights, *kernels, implementation):
        return experts(x, indices, weights, *kernels, implementation=implementation)

    return {
        name: (functools.partial(function, implementation=name), (x, weights, *kernels))
        for name in ("sorted", "ragged", "dense")
    }


def products() -> dict[str, tuple[Callable, tuple]]:
    """One grouped matmul by each implementation, and its arguments."""
    _, indices, _, kernels = arrays()
    counts = jnp.bincount(indices.reshape(-1), length=EXPERTS.value)
    rows = jax.random.normal(jax.random.key(1), (ROWS.value, WIDTH.value)).astype(DTYPE.value)
    return {
        name: (functools.partial(grouped_matmul, counts=counts, implementation=name), (rows, kernels[0]))
        for name in ("sorted", "ragged")
    }


def compare(what: str, functions: dict[str, tuple[Callable, tuple]]) -> list[dict]:
    """Compiles and measures the functions, prints their table."""
    passes, seconds = {}, {}
    for name, (function, given) in functions.items():

        def loss(*given, function=function):
            return jnp.sum(jnp.square(function(*given).astype(jnp.float32)))

        gradients = jax.grad(loss, argnums=tuple(range(len(given))))
        for kind, program in (("forward", function), ("gradients", gradients)):
            passes[name, kind] = jax.jit(program).lower(*given).compile(), given
            seconds[name, kind] = []
    for _ in range(ROUNDS.value + 1):  # the first is a warm-up
        for key, (program, given) in passes.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[key].append(time.perf_counter() - started)
    medians = {key: float(np.median(values[1:])) for key, values in seconds.items()}
    print(f"{what:10}{'forward ms':>12}{'ratio':>8}{'and gradients ms':>19}{'ratio':>8}{'temp bytes':>16}")
    figures = []
    for name in functions:
        line = f"{name:10}"
        for kind, width in (("forward", 12), ("gradients", 19)):
            ratio = medians[name, kind] / medians["sorted", kind]
            line += f"{1e3 * medians[name, kind]:{width}.1f}{ratio:8.2f}"
            figures.append({"name": f"{what}/{name}/{kind}_seconds", "value": medians[name, kind], "unit": "s"})
            figures.append({"name": f"{what}/{name}/{kind}_ratio", "value": ratio, "unit": "ratio"})
        memory = passes[name, "gradients"][0].memory_analysis().temp_size_in_bytes
        figures.append({"name": f"{what}/{name}/temp_bytes", "value": memory, "unit": "bytes"})
        print(f"{line}{memory:16,d}")
    return figures


if __name__ == "__main__":
    launch(main)
