"""What a training step takes on a TPU slice: memory, communication, time; compiled ahead of time, on any machine.

    pip install 'attnres_jax[tpu]'
    python -m attnres_jax.parallel.plan --config=configs/kimi_linear_48b.py --topology=v5p:4x4x4 [--compare=residual]

No TPU is needed: the very step that `train.py` would run is compiled for the slice (`parallel/ahead.py`), but for the
chips' machine code, unless --code asks for that: it takes long. Where each figure comes from:

    memory       parameters, optimizer: by their shardings. Bank: its sources of a micro-batch, by theirs. Gradients:
                 the sums over micro-batches; of a single one they are temporary. Activations: what the traced forward
                 pass of a micro-batch hands to the backward pass beyond parameters and bank, split as the tokens are
                 (or all that is left, where the compiler computes some of it again). Temporary: what else the
                 compiler allots, gathered parameters and padding included. All: the compiler's own sum. It fits if a
                 twentieth of the chip's memory is left for code and runtime.
    collectives  from the compiled program, loops counted as often as they run: `parallel/collectives.py`
    FLOPs        analytic, of the model (`training/flops.py`)
    time         an estimate, from published peak rates alone: the longer of compute (with the forward pass that
                 `model.remat=full` repeats) and of the memory traffic of weights, gradients and optimizer, then the
                 collectives at the rate of all of a chip's links, as if nothing hid them. A step can be slower, since
                 no matmul reaches the peak and a ring has some of the links, or faster, since communication overlaps.
    pipelines    compute has the stages' idle ticks in it, and the forward pass that every backward tick repeats. All
                 and whether it fits are the compiler's, as ever; what stages hold of the bank and of activations, their
                 traffic and their collectives are not taken apart, and the table says so.

Exit code: 0 the configuration fits, 1 it does not, 2 something to mend in the command, 3 the compiler failed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding

from attnres_jax.axes import HIDDEN, partition
from attnres_jax.cli import launch
from attnres_jax.config import Config, load_config
from attnres_jax.depth import num_appended
from attnres_jax.models.plan import cut
from attnres_jax.parallel.ahead import Program, compile_step
from attnres_jax.parallel.chips import Chip, slice_devices
from attnres_jax.parallel.collectives import Traffic, traffic
from attnres_jax.parallel.mesh import make_mesh
from attnres_jax.parallel.sharding import TABLE, AnyMesh, use_mesh, with_shardings
from attnres_jax.training import TrainState, forward_flops_per_token, training_flops_per_token
from attnres_jax.training.checkpoints import abstract_state
from attnres_jax.training.flops import peak_flops
from attnres_jax.training.loss import objective
from attnres_jax.training.step import BATCH_DTYPES

RESERVE = 0.05
"""The share of a chip's memory that a step must leave: for its machine code, and for what the runtime keeps."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of one configuration on a slice. Bytes and seconds are of one device, FLOPs of one token.

    Attributes:
      name: of the configuration.
      memory: bytes by kind, which add up to `program.total_bytes`.
      sources: of the bank.
      collectives: None if they could not be read.
      unknown_loops: loops with collectives that were counted as if they ran once.
      compute_seconds: of all products, those of recomputation included, at the peak rate; a pipeline's idle ticks too.
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
        needed = self.program.total_bytes + (self.program.code_bytes or 0)
        return needed <= (1 - RESERVE) * chip.hbm_bytes


def make_plan(config: Config, topology: str, *, code: bool = False) -> Plan:
    """Compiles the step of `config` for a TPU slice, which need not be there, and reads the plan off it.

    Raises:
      ConfigError: if there is no such slice, or its devices do not make up the mesh that `config.mesh` asks for.
      CompilationError: if the compiler fails.
    """
    devices, chip = slice_devices(topology)
    mesh = make_mesh(config, devices)
    program = compile_step(config, topology, code=code)
    with use_mesh(mesh):
        state = abstract_state(config, mesh)
        saved = saved_bytes(config, state.model)
    rows = config.data.batch_size // config.training.accumulation
    sources, bank = bank_bytes(state.model, mesh, rows, config.data.sequence_length)
    parts = _parts_of_the_tokens(mesh, rows, config.data.sequence_length)
    memory = {
        "parameters": local_bytes(state.model),
        "optimizer": local_bytes(state.opt_state),
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
    repeated = again * (model.remat == "full" or mesh.shape["stage"] > 1)
    stages, turns = mesh.shape["stage"], config.training.accumulation * config.pipeline.virtual_stages
    return Plan(
        name=config.name,
        program=program,
        memory=memory,
        sources=sources,
        collectives=found,
        unknown_loops=unknown,
        flops_per_token=useful,
        compute_seconds=tokens * (useful + repeated) * (1 + (stages - 1) / turns) / peak,
        hbm_seconds=weight_traffic(config, state, mesh) / chip.hbm_rate,
        ici_seconds=sum(row.sent_bytes for row in found or ()) / chip.ici_rate,
        useful_seconds=tokens * useful / peak,
    )


def local_bytes(tree: Any) -> int:
    """What the arrays of a tree of shapes with shardings take on one device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree)
    )


def bank_bytes(model: Any, mesh: AnyMesh, rows: int, length: int) -> tuple[int, int]:
    """(sources of the bank, its bytes on one device) for a micro-batch of `rows` sequences.

    With the sources counts what a rule keeps beside them, as `block` the logits that sites give them. Rules that read
    a stream alone have no bank: (0, 0).
    """
    rule = model.rule()
    embedding = jax.ShapeDtypeStruct((rows, length, model.config.width), model.config.dtype)
    _, newest = jax.eval_shape(rule.begin, model.sites, embedding)
    if newest is None:
        return 0, 0
    slot = jax.eval_shape(lambda sites, newest: rule.slot(sites, newest, 0), model.sites, newest)
    sources = num_appended(rule, cut(model.plan(), rule.block_size))  # and the embedding, without the newest
    total = sum(sources * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slot))
    return sources, total // _parts_of_the_tokens(mesh, rows, length)


def saved_bytes(config: Config, model: Any) -> int:
    """What the forward pass of a micro-batch hands to its backward pass, the bank included, on all devices together.

    Parameters do not count. It is what the program asks for: the compiler may still compute some of it again.
    """
    shape = config.data.batch_size // config.training.accumulation, config.data.sequence_length
    like = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in BATCH_DTYPES.items()}
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
        f"batch: {config.data.batch_size} x {tokens} tokens, {rows} at a time; "
        f"remat {config.model.remat}, {config.model.dtype}",
        "",
        _row("", *(plan.name for plan in plans)),
        "memory of a device, GB",
        *(
            _row(f"  {kind}", *(f"{plan.memory[kind] / 1e9:.3f}" for plan in plans))
            for kind in ("parameters", "optimizer", "batch, padding", "bank", "gradients", "activations", "temporary")
        ),
        _row("  all", *(f"{plan.program.total_bytes / 1e9:.3f}" for plan in plans)),
        _row("  machine code", *(_code(plan.program) for plan in plans)),
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
        "Memory is what the TPU compiler allots. Collectives are read from the program that it scheduled, each counted",
        "as often as it runs, with the bytes of a ring. The estimate is max(compute, HBM) + interconnect at published",
        "peak rates, with recomputation and with no communication hidden: not a measurement.",
    ]
    if mesh.shape["stage"] > 1:
        lines += [
            "Of a pipeline, bank, activations and temporary are not told apart rightly, nor are HBM, interconnect and",
            "so the estimate: a micro-batch counts in all stages at once, every stage's collectives in every tick.",
        ]
    if any(plan.unknown_loops for plan in plans):
        lines.append("Loops of unknown length with collectives inside, counted once: " + _counts(plans))
    return "\n".join(lines)


def main(arguments: list[str], overrides: list[str]) -> int:
    """Config, compilation, table."""
    if arguments:
        raise flags.Error(f"argument {arguments[0]!r} is not understood; settings are given as --config.key=value")
    topology, rule, code = flags.FLAGS.topology, flags.FLAGS.compare, flags.FLAGS.code
    configs = [load_config(flags.FLAGS.config, overrides)]
    if rule:
        other = load_config(flags.FLAGS.config, [*overrides, f"model.depth.rule={rule}"])
        configs.append(dataclasses.replace(other, name=rule))
    devices, chip = slice_devices(topology)
    mesh = make_mesh(configs[0], devices)  # what is wrong with it is said before anything is compiled
    plans = [make_plan(config, topology, code=code) for config in configs]
    print(show(plans, configs[0], mesh, topology, chip))
    return 0 if plans[0].fits(chip) else 1


def _parts_of_the_tokens(mesh: AnyMesh, rows: int, length: int) -> int:
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


def _code(program: Program) -> str:
    return "not generated" if program.code_bytes is None else f"{program.code_bytes / 1e9:.3f}"


def _row(label: str, *cells: str) -> str:
    return f"{label:44}" + "".join(f"{cell:>28}" for cell in cells)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file and its argument, as in configs/tiny.py:residual=block.")
    flags.DEFINE_string("topology", None, "TPU slice, as in v5p:4x4x4, v5e:4x4 or v6e:4x4: chips along each axis.")
    flags.DEFINE_string("compare", None, "A depth rule to put beside, as in residual.")
    flags.DEFINE_boolean("code", False, "Wait for the machine code too.")
    flags.mark_flags_as_required(["config", "topology"])
    launch(main)
