"""The mesh of devices: axes, sizes from the configuration, and which axes cross the slow interconnect.

    data      rows of the batch, parameters whole on each: gradients are summed over it once a step
    fsdp      rows of the batch, parameters and optimizer state in parts
    stage     layers, for pipelines
    expert    rows of the batch, and each its own experts
    context   the sequence
    tensor    heads and feed-forward channels; the sequence between the matmuls

In this order ever more is sent ever more often. Devices are laid out so that those along the last axes are neighbours;
where there are several slices (TPU) or hosts (otherwise), the first axes cross between them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from attnres_jax.config import Config, MeshConfig, attention_kinds, mlp_kinds
from attnres_jax.errors import ConfigError
from attnres_jax.models import plan_of, rule_of
from attnres_jax.parallel.schedules import make_schedule
from attnres_jax.parallel.stages import cut_chunks

AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")
TYPES = (AxisType.Auto,) * len(AXES)
Sizes = dict[str, int]


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` asks for, of all devices.

    Raises:
      ConfigError: if it does not come to the number of devices, or does not divide the model or the batch.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return Mesh(device_array(sizes, devices), AXES, axis_types=TYPES)


def mesh_that_fits(config: Config) -> Mesh:
    """The mesh of `config.mesh` if it suits this machine's devices, else one device: to look at a run anywhere."""
    try:
        return make_mesh(config)
    except ConfigError:
        return one_device_mesh()


def describe(mesh: Mesh) -> str:
    """In words: `devices: 8 x TPU v5 lite as data=2 * fsdp=4`."""
    kind = mesh.devices.flat[0].device_kind
    sizes = " * ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"devices: {mesh.size} x {kind} as {sizes}" if sizes else f"device: {kind}"


def one_device_mesh(device: Any = None) -> Mesh:
    """A mesh of one device, this process's first."""
    return Mesh(np.array([device or jax.local_devices()[0]]).reshape([1] * len(AXES)), AXES, axis_types=TYPES)


def abstract_mesh(config: Config, num_devices: int) -> AbstractMesh:
    """The mesh without the devices: enough to say where everything would lie.

    Raises:
      ConfigError: as `make_mesh`.
    """
    sizes = mesh_sizes(config, num_devices)
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=TYPES)


def mesh_sizes(config: Config, num_devices: int) -> Sizes:
    """The size of every axis; the one that is -1 takes the devices that the others leave.

    Raises:
      ConfigError: one line naming key, value and the nearest mesh that works.
    """
    asked = asked_sizes(config.mesh)
    given = math.prod(size for size in asked.values() if size > 0)
    sizes = {axis: num_devices // given if size < 0 else size for axis, size in asked.items()}
    if math.prod(sizes.values()) != num_devices:
        shown = " * ".join(f"{axis}={size}" for axis, size in asked.items() if size != 1) or "data=1"
        key = max(asked, key=lambda axis: asked[axis])
        raise ConfigError(
            f"mesh.{key}={asked[key]} does not fit: the mesh {shown} does not come to {_devices(num_devices)}"
            + _nearest(config, num_devices)
        )
    problem = next(problems(config, sizes), None)
    if problem:
        near = _nearest(config, num_devices)
        if "nearest: " in problem and near.startswith("; nearest: "):  # another way out
            near = near.replace("; nearest: ", ", or ")
        raise ConfigError(problem + near)
    return sizes


def asked_sizes(mesh: MeshConfig) -> Sizes:
    """By axis, in the order of `AXES`."""
    return {axis: getattr(mesh, axis) for axis in AXES}


def problems(config: Config, sizes: Sizes) -> Iterator[str]:
    """What of the model and the batch the mesh does not divide, a line each."""
    yield from _pipeline_problems(config, sizes)
    for key, length in split_by_tensor(config).items():
        if length % sizes["tensor"]:
            yield f"mesh.tensor={sizes['tensor']} does not divide {key}={length}"
    if sizes["expert"] > 1 and "moe" not in mlp_kinds(config.model):
        yield f"mesh.expert={sizes['expert']}: model.mlp_layers={config.model.mlp_layers!r} has no experts to split"
    elif "moe" in mlp_kinds(config.model) and config.model.moe.num_experts % sizes["expert"]:
        yield f"mesh.expert={sizes['expert']} does not divide model.moe.num_experts={config.model.moe.num_experts}"
    if config.data.sequence_length % sizes["context"]:
        yield f"mesh.context={sizes['context']} does not divide data.sequence_length={config.data.sequence_length}"
    parts, micro_batches = sizes["data"] * sizes["fsdp"] * sizes["expert"], config.training.accumulation
    if config.data.batch_size % (parts * micro_batches):
        near = -(-config.data.batch_size // (parts * micro_batches)) * parts * micro_batches
        steps = f", {micro_batches} micro-batches" if micro_batches > 1 else ""
        yield (
            f"data.batch_size={config.data.batch_size} does not divide over mesh.data={sizes['data']} * "
            f"mesh.fsdp={sizes['fsdp']} * mesh.expert={sizes['expert']}{steps}; data.batch_size={near} would"
        )


def _pipeline_problems(config: Config, sizes: Sizes) -> Iterator[str]:
    stages = sizes["stage"]
    if stages == 1:
        return
    model, pipeline, micro_batches = config.model, config.pipeline, config.training.accumulation
    try:
        make_schedule(pipeline.schedule, stages, pipeline.virtual_stages, micro_batches)
        cut_chunks(plan_of(model), rule_of(model), stages * pipeline.virtual_stages)
    except ValueError as error:
        virtual = f", pipeline.virtual_stages={pipeline.virtual_stages}" if pipeline.virtual_stages > 1 else ""
        yield f"mesh.stage={stages}{virtual}: {error}"
    if model.vocab_size % stages:
        yield f"mesh.stage={stages} does not divide model.vocab_size={model.vocab_size}"


def split_by_tensor(config: Config) -> dict[str, int]:
    """What `tensor` has to divide, by key."""
    model = config.model
    kinds, split = {*attention_kinds(model), *mlp_kinds(model)}, {}
    if kinds & {"gqa", "mla"} or ("kda" in kinds and not model.kda.num_heads):
        split["model.num_heads"] = model.num_heads
    if "gqa" in kinds:
        split["model.num_kv_heads"] = model.num_kv_heads
    if "kda" in kinds and model.kda.num_heads:
        split["model.kda.num_heads"] = model.kda.num_heads
    if "swiglu" in kinds:
        split["model.mlp_width"] = model.mlp_width
    if "moe" in kinds:
        split["model.moe.expert_width"] = model.moe.expert_width
        if model.moe.num_shared and model.moe.shared_width:
            split["model.moe.shared_width"] = model.moe.shared_width
    return split


def device_array(sizes: Sizes, devices: Sequence[Any]) -> np.ndarray:
    """The devices by axis: neighbours along the last ones, and as few axes as can be across slices or hosts."""
    granules, by_process = _granules(devices)
    inner, outer = across(sizes, granules)
    shape = [inner[axis] for axis in AXES]
    if granules == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        shape,
        [outer[axis] for axis in AXES],
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def across(sizes: Sizes, granules: int) -> tuple[Sizes, Sizes]:
    """(sizes within a slice or host, sizes across them): what crosses is taken from the front of `AXES`."""
    outer = {}
    for axis in AXES:
        outer[axis] = math.gcd(sizes[axis], granules)
        granules //= outer[axis]
    return {axis: sizes[axis] // outer[axis] for axis in AXES}, outer


def _granules(devices: Sequence[Any]) -> tuple[int, bool]:
    """(groups of devices with a fast interconnect inside, whether those are the processes)."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 or devices[0].platform == "tpu":
        return len(slices), False
    return len({device.process_index for device in devices}), True


def _nearest(config: Config, num_devices: int) -> str:
    """The working mesh that differs least, as what to change."""
    asked = asked_sizes(config.mesh)

    def distance(sizes: Sizes) -> tuple[int, float]:
        changes = [abs(math.log2(sizes[axis] / asked[axis])) for axis in AXES if asked[axis] > 0]
        return sum(change > 0 for change in changes), math.fsum(changes)

    working = (sizes for sizes in _factorisations(num_devices) if next(problems(config, sizes), None) is None)
    best = min(working, key=distance, default=None)
    if best is None:
        works = lambda n: any(next(problems(config, sizes), None) is None for sizes in _factorisations(n))  # noqa: E731
        fewer = next((n for n in range(num_devices - 1, 0, -1) if works(n)), 0)
        return f"; no mesh of {_devices(num_devices)} works; nearest: {_devices(fewer)}"
    change = [f"mesh.{axis}={best[axis]}" for axis in AXES if asked[axis] not in (best[axis], -1)]
    return f"; nearest: {', '.join(change)}" if change else ""


def _factorisations(number: int) -> Iterator[Sizes]:
    """All sizes that multiply to `number`."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    axes = [axis for axis in AXES if axis != "data"]

    def extend(left: int, count: int) -> Iterator[tuple[int, ...]]:
        if not count:
            yield (left,)
            return
        for n in divisors:
            if left % n == 0:
                yield from ((n, *rest) for rest in extend(left // n, count - 1))

    for *rest, data in extend(number, len(axes)):
        yield {**dict.fromkeys(AXES, 1), **dict(zip(axes, rest, strict=True)), "data": data}


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
