"""Pipelines with depth attention: what travels, what it takes in time and memory, on simulated devices.

    python benchmarks/pipeline.py                      # all of it, on one thread a device
    python benchmarks/pipeline.py --parts=transport    # what travels, read from compiled programs, beside eqs. 7 and 8
    python benchmarks/pipeline.py --parts=memory       # temporary memory of a device as microbatches become more
    python benchmarks/pipeline.py --parts=bubble       # time as microbatches become more: what idle ticks cost
    python benchmarks/pipeline.py --parts=overhead     # block over residual under the same pipeline, in turn

The number of devices is fixed when JAX starts: each part asks for the most that it needs. The simulated devices share
this machine's cores, so that times say what the whole schedule works, not how stages wait for each other, but for
`bubble` with as many stages as cores.
"""

import json
import os
import platform
import re
import time
from pathlib import Path

# Before JAX starts. One thread for each device's own work, as if every device had a core.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from attnres_jax.cli import launch
from attnres_jax.config import (
    Config,
    DataConfig,
    DepthConfig,
    MeshConfig,
    ModelConfig,
    PipelineConfig,
    TrainingConfig,
)
from attnres_jax.errors import ConfigError
from attnres_jax.models import Decoder
from attnres_jax.parallel import (
    cached_transmissions,
    make_mesh,
    naive_transmissions,
    pipeline_gradients,
    pipeline_ticks,
    put_batch,
    use_mesh,
    with_shardings,
)
from attnres_jax.parallel.collectives import called, parse, type_bytes
from attnres_jax.training import retain_host_memory

PARTS = flags.DEFINE_list("parts", ["transport", "memory", "bubble", "overhead"], "Which parts.")
WIDTH = flags.DEFINE_integer("width", 512, "Model width of `overhead` and `bubble`.")
TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens of a microbatch of `overhead`.")
MICROBATCHES = flags.DEFINE_integer("microbatches", 16, "Microbatches of `overhead`.", lower_bound=4)
PAIRS = flags.DEFINE_integer("pairs", 3, "Rounds of `overhead`, each arm once.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")
flags.register_validator("microbatches", lambda count: count % 4 == 0, "must be a multiple of the four stages")

SHAPES = ((2, 1), (2, 2), (4, 1), (4, 2), (8, 2))
PREPARED = 8 << 30  # bytes of memory that `overhead` touches before it measures
TRANSPORTS = {"naive": naive_transmissions, "cached": cached_transmissions}


def main(arguments: list[str], overrides: list[str]) -> None:
    if arguments or overrides:
        raise ConfigError(f"unexpected argument {(arguments or overrides)[0]!r}")
    known = {"transport": transport, "memory": memory, "bubble": bubble, "overhead": overhead}
    unknown = [part for part in PARTS.value if part not in known]
    if unknown:
        raise ConfigError(f"--parts={unknown[0]} is unknown; known: {', '.join(known)}")
    retain_host_memory()
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    print(f"{jax.device_count()} simulated devices on {os.cpu_count()} cores, {platform.machine()}, {versions}")
    figures = [figure for part in PARTS.value for figure in known[part]()]
    if JSON.value:
        named = [{"name": name, "value": float(value), "unit": unit} for name, value, unit in figures]
        Path(JSON.value).write_text(json.dumps(named, indent=1) + "\n")


def transport() -> list[tuple]:
    """Sources that a microbatch's hops carry: as the equations say, as the schedule sends, as the program is."""
    print("\nBlock representations sent a microbatch, one block a chunk; forward and backward read from the program")
    print(f"{'P':>3}{'V':>3}{'transport':>11}{'equation':>10}{'forward':>10}{'backward':>10}{'at most a hop':>21}")
    figures = []
    for stages, virtual in SHAPES:
        for name, equation in TRANSPORTS.items():
            config = small(stages, virtual, 2 * stages, transport=name, width=16, tokens=8)
            program = compile_on(config)[0]
            sent = {way: hops(program.as_text(), config, way) for way in ("on", "back")}
            source = config.data.sequence_length * config.model.width * 4
            counts = {way: sum(sent[way].values()) / config.training.accumulation / source for way in sent}
            most = max(sent["on"].values()) / config.training.accumulation
            want = equation(stages, virtual)
            print(
                f"{stages:>3}{virtual:>3}{name:>11}{want:>10g}{counts['on']:>10g}{counts['back']:>10g}"
                f"{most / source:>15g} blocks"
            )
            label = f"transport/P{stages}_V{virtual}/{name}"
            figures += [(f"{label}/equation", want, "blocks"), (f"{label}/most_a_hop", most / source, "blocks")]
            figures += [(f"{label}/{way}", count, "blocks") for way, count in counts.items()]
    return figures


def memory() -> list[tuple]:
    """Temporary bytes of a device, by number of microbatches."""
    print("\nTemporary memory of a device in hidden states [b, T, D], P=4, 16 layers of width 256, 64 tokens")
    arms = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)]
    micros = (8, 16, 32, 64)
    print(f"{'schedule':18}{'rule':>10}" + "".join(f"{f'M={m}':>9}" for m in micros))
    figures = []
    for schedule, virtual in arms:
        for rule in ("residual", "block"):
            values = []
            for count in micros:
                config = small(4, virtual, count, schedule=schedule, rule=rule, width=256, tokens=64, layers=16)
                program = compile_on(config)[0]
                values.append(program.memory_analysis().temp_size_in_bytes / (64 * 256 * 4))
                figures.append((f"memory/{schedule}/{rule}/M{count}", values[-1], "hidden states"))
            print(f"{schedule:18}{rule:>10}" + "".join(f"{value:9.1f}" for value in values))
    return figures


def bubble() -> list[tuple]:
    """Time by number of microbatches on two stages, one thread each."""
    print(f"\nA step on P=2 stages, 8 layers of width {WIDTH.value}, 256 tokens, a thread each")
    counts, seconds = (2, 4, 8, 16), {}
    for count in counts:
        config = small(2, 1, count, schedule="1f1b", rule="block", width=WIDTH.value, tokens=256, layers=8)
        seconds[count] = np.inf
        program, arguments = compile_on(config)
        for _ in range(2 + PAIRS.value):
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[count] = min(seconds[count], time.perf_counter() - started)
    each, start = np.polyfit(counts, [seconds[count] for count in counts], 1)
    for count in counts:
        ideal = (count + 1) * each
        print(f"M={count:<3} {seconds[count]:7.3f} s, {seconds[count] / ideal:.3f} of (M + P - 1) x {each:.3f} s")
    print(f"the start costs {start / each:.2f} microbatches: 1 (P - 1) if idle work is skipped, 2 if it is not")
    figures = [(f"bubble/M{count}", seconds[count], "s") for count in counts]
    return [*figures, ("bubble/microbatch", each, "s"), ("bubble/start", start / each, "microbatches")]


def overhead() -> list[tuple]:
    """Step time and bytes sent of `block` over `residual`, P=4, V=2."""
    count = MICROBATCHES.value
    print(f"\nP=4, V=2, M={count}, 16 layers of width {WIDTH.value}, {TOKENS.value} tokens a microbatch")
    arms = {}
    for rule in ("residual", "block"):
        config = small(4, 2, count, rule=rule, width=WIDTH.value, tokens=TOKENS.value, layers=16)
        arms[rule] = (config, *compile_on(config))
    # As after a number of steps. Until then glibc finds no place among what was freed for some large arrays, and takes
    # new pages from the kernel, under `block` above all.
    np.ones(PREPARED, np.int8)
    seconds: dict[str, list[float]] = {rule: [] for rule in arms}
    processor: dict[str, list[float]] = {rule: [] for rule in arms}
    for _, program, arguments in arms.values():
        jax.block_until_ready(program(*arguments))
    for _ in range(PAIRS.value):
        for rule, (_, program, arguments) in arms.items():
            started, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            seconds[rule].append(time.perf_counter() - started)
            processor[rule].append(time.process_time() - busy)
    figures = []
    for name, values in (("step", seconds), ("processor", processor)):
        medians = {rule: float(np.median(own)) for rule, own in values.items()}
        ratio = medians["block"] / medians["residual"]
        print(f"{name:10} residual {medians['residual']:.3f} s, block {medians['block']:.3f} s: {ratio:.3f}")
        figures += [(f"overhead/{name}/{rule}", value, "s") for rule, value in medians.items()]
        figures.append((f"overhead/{name}", ratio, "ratio"))
    for rule, (config, program, _) in arms.items():
        source = config.data.sequence_length * config.model.width * 4
        text = program.as_text()
        sent = sum(sum(hops(text, config, way).values()) for way in ("on", "back")) / count / source
        print(f"{rule:10} sends {sent:g} hidden states a microbatch, forward and backward, over all hops")
        figures.append((f"overhead/sent/{rule}", sent, "hidden states"))
    return figures


def small(
    stages: int,
    virtual: int,
    microbatches: int,
    *,
    schedule: str | None = None,
    transport: str = "cached",
    rule: str = "block",
    width: int,
    tokens: int,
    layers: int = 0,
) -> Config:
    """A decoder of one row a microbatch; without `layers`, a block of one layer on each chunk."""
    chunks = stages * virtual
    layers = layers or chunks
    model = ModelConfig(
        vocab_size=16 * chunks,
        width=width,
        num_layers=layers,
        num_heads=max(1, width // 64),
        num_kv_heads=max(1, width // 64),
        mlp_width=3 * width,
        max_length=tokens,
        remat="full",
        depth=DepthConfig(rule=rule, block_size=2 * layers // 8 if layers % 8 == 0 and layers > chunks else 2),
    )
    return Config(
        model=model,
        data=DataConfig(batch_size=microbatches, sequence_length=tokens),
        training=TrainingConfig(accumulation=microbatches),
        mesh=MeshConfig(data=1, stage=stages),
        pipeline=PipelineConfig(
            schedule=schedule or ("1f1b" if virtual == 1 else "interleaved_1f1b"),
            virtual_stages=virtual,
            transport=transport,
        ),
    )


def compile_on(config: Config) -> tuple[jax.stages.Compiled, tuple]:
    """(loss and gradients of all microbatches, compiled, and its arguments)."""
    mesh = make_mesh(config, jax.devices()[: config.mesh.stage])
    draw = np.random.default_rng(0)
    shape = config.data.batch_size, config.data.sequence_length
    tokens = draw.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "weights": np.ones(shape, np.float32),
    }
    text_bytes, total = jnp.ones(config.model.vocab_size), jnp.float32(np.prod(shape))

    def gradients(model, batch):
        return pipeline_gradients(model, batch, text_bytes, total, config.training, config.pipeline)

    with use_mesh(mesh):
        make = lambda: Decoder(config.model, rngs=nnx.Rngs(0))  # noqa: E731
        places = jax.tree.map(lambda leaf: leaf.sharding, with_shardings(mesh, jax.eval_shape(make)))
        arguments = jax.jit(make, out_shardings=places)(), put_batch(mesh, batch)
        return jax.jit(gradients, out_shardings=(places, None)).lower(*arguments).compile(), arguments


def hops(text: str, config: Config, way: str) -> dict[int, float]:
    """Bytes of all microbatches that go over each hop, by the chunk nearer to the end, as the program sends them.

    The program has a branch for each pattern of sends, and in it the permutes with their pairs of devices and their
    shapes; the schedule says in which ticks each branch is taken, and at which chunk a device then is.
    """
    table, which = pipeline_ticks(config, backward=way == "back")
    branches = permutes(text, f"send_{way}")
    found: dict[int, float] = {}
    for row, branch in zip(table.tolist(), which.tolist(), strict=True):
        for source, size in branches[branch]:
            chunk = row[source] + (way == "on")
            found[chunk] = found.get(chunk, 0) + size
    return found


def permutes(text: str, scope: str) -> list[list[tuple[int, int]]]:
    """For each branch of the conditional in that scope (device that sends, bytes) of what is sent in it."""
    computations, _ = parse(text)
    inside = [i for instructions in computations.values() for i in instructions if f"{scope}/" in i.rest]
    choices = [list(called(i)) for i in inside if i.opcode == "conditional"]
    # A single pattern leaves no choice: then what has the scope in its name.
    branches = [computations[name] for name in choices[0]] if choices else [inside]
    return [
        [
            (int(source), type_bytes(instruction.type))
            for instruction in instructions
            if instruction.opcode == "collective-permute"
            for source in re.findall(r"\{(\d+),\d+\}", instruction.rest)
        ]
        for instructions in branches
    ]


if __name__ == "__main__":
    launch(main)
