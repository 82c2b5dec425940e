"""What a training step takes on a TPU slice: memory, communication, time; compiled ahead of time, on any machine.

    pip install 'attnres_jax[tpu]'
    python -m attnres_jax.parallel.plan --config=configs/kimi_linear_48b.py --topology=v5p:4x4x4 [--compare=residual]

No TPU is needed: the very step that `train.py` would run is compiled for the slice. Where each figure comes from:

    memory       parameters, optimizer: by their shardings. Bank: its sources of a micro-batch, by theirs. Gradients:
                 the sums over micro-batches; of a single one they are temporary. Activations: what the traced forward
                 pass of a micro-batch hands to the backward pass beyond parameters and bank, split as the tokens are.
                 Temporary: what else the compiler allots, gathered parameters and padding included. All: the
                 compiler's own sum.
    collectives  from the compiled program, loops counted as often as they run: `parallel/collectives.py`
    FLOPs        analytic, of the model (`training/flops.py`)
    time         an estimate, from published peak rates alone: the longer of compute (with the forward pass that
                 `model.remat=full` repeats) and of the memory traffic of weights, gradients and optimizer, then the
                 collectives, as if nothing hid them. A step can be slower, since no matmul reaches the peak, or
                 faster, since communication overlaps.

Exit code: 0 it fits, 1 it does not, 2 something to mend in the command.
"""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding

from attnres_jax.axes import HIDDEN, partition
from attnres_jax.cli import launch
from attnres_jax.config import Config, load_config
from attnres_jax.models.plan import cut
from attnres_jax.parallel.chips import Chip, slice_devices
from attnres_jax.parallel.collectives import Traffic, traffic
from attnres_jax.parallel.mesh import make_mesh
from attnres_jax.parallel.sharding import TABLE, replicated, use_mesh, with_shardings
from attnres_jax.training import (
    TrainState,
    forward_flops_per_token,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
    training_flops_per_token,
)
from attnres_jax.training.checkpoints import abstract_state
from attnres_jax.training.flops import peak_flops
from attnres_jax.training.loss import objective
from attnres_jax.training.step import batch_shapes


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a step on one device.

    Attributes:
      argument_bytes: state and batch.
      total_bytes: all that it allots; with its own word that this is too much, `memory` is None.
      text: its HLO after all optimisations, empty if the compiler gave none.
      seconds: compiling took.
    """

    argument_bytes: int
    code_bytes: int
    total_bytes: int
    text: str
    seconds: float
    too_large: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of one configuration on a slice. Bytes and seconds are of one device, FLOPs of one token.

    Attributes:
      name: of the configuration.
      memory: bytes by kind, which add up to `program.total_bytes`.
      sources: of the bank.
      collectives: None if they could not be read.
      unknown_loops: loops with collectives that were counted as if they ran once.
      compute_seconds: of all products, those of recomputation included, at the peak rate.
      hbm_seconds: of weights, gradients and optimizer state, at the peak rate.
      ici_seconds: of the collectives, at the peak rate.
      useful_seconds: of the model's own products: `compute_seconds` without recomputation.
    """

    name: str
    program: Program
    memory: dict[str, int]
    sources: int
    collectives: list[Traffic] | None
    unknown_loops: int
    flops_per_token: int
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    useful_seconds: float

    @property
    def seconds(self) -> float:
        """Of a step, estimated."""
        return max(self.compute_seconds, self.hbm_seconds) + self.ici_seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the chips could have done in that time, estimated."""
        return self.useful_seconds / self.seconds

    def fits(self, chip: Chip) -> bool:
        """Whether the program's memory is there."""
        return not self.program.too_large and self.program.total_bytes <= chip.hbm_bytes


def make_plan(config: Config, devices: Sequence[Any], chip: Chip) -> Plan:
    """Compiles the step of `config` for `devices`, which need not be there, and reads the plan off it.

    Raises:
      ConfigError: if so many devices do not make up the mesh that `config.mesh` asks for.
    """
    mesh = make_mesh(config, devices)
    with use_mesh(mesh):
        state = abstract_state(config, mesh)
        program = compile_step(config, state, mesh)
        saved = saved_bytes(config, state.model)
    rows = config.data.batch_size // config.training.accumulation
    sources, bank = bank_bytes(state.model, mesh, rows, config.data.sequence_length)
    parts = _parts_of_the_tokens(mesh, rows, config.data.sequence_length)
    memory = {
        "parameters": local_bytes(state.model),
        "optimizer": local_bytes(state.opt_state),
        "code": program.code_bytes,
    }
    memory["batch, padding"] = max(0, program.argument_bytes - memory["parameters"] - memory["optimizer"])
    memory["bank"] = bank
    memory["gradients"] = local_bytes(state.model) if config.training.accumulation > 1 else 0
    left = program.total_bytes - sum(memory.values())
    memory["activations"] = min(left, saved // parts - bank)
    memory["temporary"] = left - memory["activations"]
    found, unknown = traffic(program.text, mesh.shape) if program.text else (None, 0)
    tokens = config.data.batch_size * config.data.sequence_length
    peak, model = peak_flops(devices), config.model
    again = forward_flops_per_token(model, config.data.sequence_length) - 2 * model.width * model.vocab_size
    useful = training_flops_per_token(model, config.data.sequence_length)
    return Plan(
        name=config.name,
        program=program,
        memory=memory,
        sources=sources,
        collectives=found,
        unknown_loops=unknown,
        flops_per_token=useful,
        compute_seconds=tokens * (useful + again * (model.remat == "full")) / peak,
        hbm_seconds=weight_traffic(config, state, mesh) / chip.hbm_rate,
        ici_seconds=sum(row.sent_bytes for row in found or ()) / chip.ici_rate,
        useful_seconds=tokens * useful / peak,
    )


def compile_step(config: Config, state: TrainState, mesh: Mesh) -> Program:
    """The training step that `train` would run, compiled for the devices of the mesh that is set."""
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    step = make_train_step(config.training, make_optimizer(config.optimizer, schedule), schedule, state)
    arguments = state, batch_shapes(config.data, mesh), token_bytes_shape(config, mesh)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered = step.lower(*arguments)
        try:
            memory = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            total = _needed(str(error))
            arguments_alone = local_bytes(state)
            return Program(arguments_alone, 0, total, _text(folder), time.perf_counter() - started, too_large=True)
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        code = memory.generated_code_size_in_bytes
        total = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + code
        return Program(memory.argument_size_in_bytes, code, total, _text(folder), time.perf_counter() - started)


def token_bytes_shape(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Of the table of the tokens' bytes, which a step takes beside state and batch."""
    return jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32, sharding=replicated(mesh))


def local_bytes(tree: Any) -> int:
    """What the arrays of a tree of shapes with shardings take on one device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree)
    )


def bank_bytes(model: Any, mesh: Mesh, rows: int, length: int) -> tuple[int, int]:
    """(sources of the bank, its bytes on one device) for a micro-batch of `rows` sequences.

    Rules that read a stream alone have no bank: (0, 0).
    """
    rule = model.rule()
    embedding = jax.ShapeDtypeStruct((rows, length, model.config.width), model.config.dtype)
    _, bank = jax.eval_shape(rule.begin, model.sites, embedding)
    leaves = jax.tree.leaves(bank)
    if not leaves:
        return 0, 0
    sources = len(leaves[0].shape) and leaves[0].shape[0]
    sources += sum(len(s.slots) * rule.num_appended(len(s.kinds)) for s in cut(model.plan(), rule.block_size))
    total = sum(sources * math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)
    return sources, total // _parts_of_the_tokens(mesh, rows, length)


def saved_bytes(config: Config, model: Any) -> int:
    """What the forward pass of a micro-batch hands to its backward pass, the bank included, on all devices together.

    Parameters do not count. It is what the program asks for: the compiler may still compute some of it again.
    """
    shape = config.data.batch_size // config.training.accumulation, config.data.sequence_length
    like = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in _BATCH.items()}
    table = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32)

    def pullback(model: Any, batch: Any, token_bytes: Any) -> Any:
        loss = lambda model: objective(model, batch, token_bytes, 1.0, config.training)[0]  # noqa: E731
        return jax.vjp(loss, model)[1]

    jaxpr = jax.make_jaxpr(pullback)(model, like, table).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    saved = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in given}
    return sum(math.prod(aval.shape) * _itemsize(aval.dtype) for aval in saved.values())


def weight_traffic(config: Config, state: TrainState, mesh: Mesh) -> int:
    """Bytes that weights, gradients and optimizer state move to and from a device's memory in a step, at least.

    Each micro-batch reads the weights that the device multiplies with, in the dtype of the matmuls, forward, backward
    and where it recomputes, and adds its gradients up; the update reads and writes parameters and moments once.
    """
    table = tuple(row for row in TABLE if row[0] not in ("width", "rank"))
    used = local_bytes(with_shardings(mesh, state.model, table)) // 4 * jnp.dtype(config.model.dtype).itemsize
    passes = 3 if config.model.remat == "full" else 2
    gradients = 3 * local_bytes(state.model)
    update = 2 * (local_bytes(state.model) + local_bytes(state.opt_state))
    return config.training.accumulation * (passes * used + gradients) + update


def show(plans: Sequence[Plan], config: Config, mesh: Mesh, topology: str, chip: Chip) -> str:
    """The plans side by side, as they are printed."""
    rows, tokens = config.data.batch_size // config.training.accumulation, config.data.sequence_length
    sizes = " * ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    lines = [
        f"{topology}: {mesh.size} x {mesh.devices.flat[0].device_kind} as {sizes}",
        f"batch: {config.data.batch_size} x {tokens} tokens in {config.training.accumulation} micro-batches of {rows}; "
        f"remat {config.model.remat}, {config.model.dtype}",
        "",
        _row("", *(plan.name for plan in plans)),
        "memory of a device, GB",
        *(
            _row(f"  {kind}", *(f"{plan.memory[kind] / 1e9:.3f}" for plan in plans))
            for kind in ("parameters", "optimizer", "batch, padding", "bank", "gradients", "activations", "temporary")
        ),
        _row("  code", *(f"{plan.memory['code'] / 1e9:.3f}" for plan in plans)),
        _row("  all", *(f"{plan.program.total_bytes / 1e9:.3f}" for plan in plans)),
        _row(f"  fits in {chip.hbm_bytes / 1e9:.0f} GB", *("yes" if plan.fits(chip) else "no" for plan in plans)),
        _row("  sources in the bank", *(str(plan.sources or "-") for plan in plans)),
        "collectives of a step, GB sent by a device (how many)",
        *_collectives(plans),
        "a step",
        _row("  model FLOPs a token", *(f"{plan.flops_per_token:.4g}" for plan in plans)),
        _row("  model FLOPs", *(f"{plan.flops_per_token * config.data.batch_size * tokens:.4g}" for plan in plans)),
        _row("  compute, s", *(f"{plan.compute_seconds:.3f}" for plan in plans)),
        _row("  HBM, s at least", *(f"{plan.hbm_seconds:.3f}" for plan in plans)),
        _row("  interconnect, s", *(f"{plan.ici_seconds:.3f}" for plan in plans)),
        _row("  estimate, s", *(f"{plan.seconds:.3f}" for plan in plans)),
        _row("  estimate, utilisation", *(f"{plan.utilisation:.1%}" for plan in plans)),
        _row("compiled in, s", *(f"{plan.program.seconds:.0f}" for plan in plans)),
        "",
        "Estimate: max(compute, HBM) + interconnect at published peak rates, nothing overlapped: not a measurement.",
    ]
    if any(plan.unknown_loops for plan in plans):
        lines.append("Loops of unknown length with collectives inside, counted once: " + _counts(plans))
    return "\n".join(lines)


def main(arguments: list[str], overrides: list[str]) -> int:
    """Config, compilation, table."""
    if arguments:
        raise flags.Error(f"argument {arguments[0]!r} is not understood; settings are given as --config.key=value")
    topology, rule = flags.FLAGS.topology, flags.FLAGS.compare
    configs = [load_config(flags.FLAGS.config, overrides)]
    if rule:
        other = load_config(flags.FLAGS.config, [*overrides, f"model.depth.rule={rule}"])
        configs.append(dataclasses.replace(other, name=rule))
    devices, chip = slice_devices(topology)
    plans = [make_plan(config, devices, chip) for config in configs]
    print(show(plans, configs[0], make_mesh(configs[0], devices), topology, chip))
    return 0 if all(plan.fits(chip) for plan in plans) else 1


_BATCH = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _parts_of_the_tokens(mesh: Mesh, rows: int, length: int) -> int:
    """In how many parts hidden states are."""
    shape = rows, length, 1
    place = NamedSharding(mesh, partition(shape, HIDDEN, dict(mesh.shape), TABLE))
    return math.prod(shape) // math.prod(place.shard_shape(shape))


def _itemsize(dtype: Any) -> int:
    return (
        jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype)).size * 4
        if _is_key(dtype)
        else dtype.itemsize
    )


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _text(folder: str) -> str:
    """The program as the compiler dumped it: `as_text` fails on jax 0.10.2 where collectives are asynchronous."""
    files = [*Path(folder).glob("*jit_step*after_optimizations.txt")]
    return max(files, key=lambda file: file.stat().st_size).read_text() if files else ""


def _needed(message: str) -> int:
    """Bytes of a program that the compiler refused for their number.

    Raises:
      RuntimeError: if that is not why it was refused.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    if not used:
        raise RuntimeError(message)
    return int(float(used[1]) * _UNITS[used[2]])


def _collectives(plans: Sequence[Plan]) -> list[str]:
    if any(plan.collectives is None for plan in plans):
        return ["  the compiler gave no program to read them from"]
    tables = [{(row.kind, row.axes): row for row in plan.collectives} for plan in plans]
    keys = sorted({key for table in tables for key in table}, key=lambda key: (key[1], key[0]))
    lines = []
    for kind, axes in keys:
        found = [table.get((kind, axes)) for table in tables]
        cells = (f"{row.sent_bytes / 1e9:.3f} ({row.times:,})" if row else "-" for row in found)
        lines.append(_row(f"  {' * '.join(axes)}: {kind}", *cells))
    return lines or ["  none"]


def _counts(plans: Sequence[Plan]) -> str:
    return ", ".join(str(plan.unknown_loops) for plan in plans)


def _row(label: str, *cells: str) -> str:
    return f"{label:44}" + "".join(f"{cell:>28}" for cell in cells)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file and its argument, as in configs/tiny.py:residual=block.")
    flags.DEFINE_string("topology", None, "TPU slice, as in v5p:4x4x4, v5e:4x4 or v6e:4x4: chips along each axis.")
    flags.DEFINE_string("compare", None, "A depth rule to put beside, as in residual.")
    flags.mark_flags_as_required(["config", "topology"])
    launch(main)
