"""Where arrays lie: one table from logical axes to mesh axes, and the logical axes of every parameter by its name.

    batch      tokens by rows. `expert` is one more axis of it: outside of the experts those devices would else all do
               the same work, and inside tokens are exchanged over it.
    sequence   tokens by position, in hidden states and the bank: also over `tensor`, between the matmuls
    length     tokens by position inside a sublayer, where every device of `tensor` has its own heads of all of them
    experts    the experts that a device of `expert` computes
    expert_kernels  the experts whose parameters it keeps: fewer, where `fsdp` divides them further. Gradients are
               summed into whole experts then; into parts of a width XLA on TPU sums only what is whole tiles
    width      of parameters: split over `fsdp`, and put together where they are used; those of no expert over `expert`
               too, whose devices have rows of their own like those of `fsdp`; and over `stage`, where a step of the
               pipeline begins with each stage getting its layers

A logical axis that its mesh axes do not divide is whole on every device; `python -m attnres_jax.parallel.show` prints
what came of it.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from attnres_jax.axes import Table, partition, table_in_force
from attnres_jax.models import parameter_name

TABLE: Table = (
    ("batch", ("data", "fsdp", "expert")),
    ("sequence", ("context", "tensor")),
    ("length", ("context",)),
    ("heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("stage", "tensor")),
    ("experts", ("expert",)),
    ("expert_kernels", ("expert", "fsdp")),
    ("width", ("stage", "fsdp", "expert")),
    ("rank", ("stage", "fsdp", "expert")),
)

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embedding.table", ("vocab", "width")),
    ("head.table", ("vocab", "width")),
    ("*.moe.shared.down.kernel", ("mlp", "width")),
    ("*.moe.shared.*.kernel", ("width", "mlp")),
    ("*.moe.latent_up.kernel", (None, "width")),
    ("*.moe.router.kernel", ("width", None)),
    ("*.moe.down.kernel", ("expert_kernels", "mlp", "width")),
    ("*.moe.gate.kernel", ("expert_kernels", "width", "mlp")),
    ("*.moe.up.kernel", ("expert_kernels", "width", "mlp")),
    ("*.swiglu.down.kernel", ("mlp", "width")),
    ("*.swiglu.*.kernel", ("width", "mlp")),
    ("*.mla.latent.kernel", ("width", None)),
    ("*.mla.expand.kernel", ("rank", "heads")),
    ("*_down.kernel", ("width", None)),
    ("*_up.kernel", ("rank", "heads")),
    ("*.out.kernel", ("heads", "width")),
    ("*.kernel", ("width", "heads")),
    ("*.kda.*_conv.taps", (None, "heads")),
    ("*.kda.log_rate", ("heads",)),
    ("*.kda.decay_bias", ("heads",)),
)
"""The first pattern that matches a parameter's name counts; those of sublayers have a layer axis in front. What matches
none (norm scales, score corrections, everything of the depth rule) is whole on every device."""

AnyMesh = Mesh | AbstractMesh


@contextmanager
def use_mesh(mesh: Mesh, table: Table = TABLE) -> Iterator[Mesh]:
    """Inside, models are computed on `mesh`, split as the table says."""
    with jax.set_mesh(mesh), table_in_force(table):
        yield mesh


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The logical axes of a parameter, or of what an optimizer keeps of one under a longer name."""
    name = re.sub(r"^.*\.(?=(sublayers|embedding|head|sites|final_norm)\.)", "", name)
    axes = next((axes for pattern, axes in PARAMETERS if fnmatch.fnmatch(name, pattern)), ())
    axes = (None, *axes) if axes and name.startswith("sublayers.") else axes
    return axes if len(axes) == ndim else (None,) * ndim


def parameter_sharding(mesh: AnyMesh, name: str, shape: Sequence[int], table: Table = TABLE) -> NamedSharding:
    """Where the parameter of this name and shape lies; on a mesh without any of the table's axes, see `spread`."""
    if not set(mesh.axis_names) & {axis for _, axes in table for axis in axes}:
        return spread(mesh, shape)
    return NamedSharding(mesh, partition(shape, logical_axes(name, len(shape)), dict(mesh.shape), table))


def with_shardings(mesh: AnyMesh, shapes: Any, table: Table = TABLE) -> Any:
    """The pytree of shapes (a model, an optimizer's state) with each leaf's place: what `jit` and restoring take."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(mesh, parameter_name(path), leaf.shape, table)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def spread(mesh: AnyMesh, shape: Sequence[int]) -> NamedSharding:
    """Over all devices along the largest axis that they divide; what they do not divide is on every device."""
    fitting = [axis for axis, size in enumerate(shape) if size % mesh.size == 0 and size > 0]
    if not fitting:
        return NamedSharding(mesh, PartitionSpec())
    axis = max(fitting, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh, shape: Sequence[int]) -> NamedSharding:
    """Of arrays [B, T]: rows over `data`, `fsdp` and `expert`, positions over `context`."""
    return NamedSharding(mesh, partition(shape, ("batch", "length"), dict(mesh.shape), TABLE))


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """A batch that every process has whole, as global arrays [B, T] that lie on the mesh."""
    return {
        key: jax.make_array_from_callback(rows.shape, batch_sharding(mesh, rows.shape), lambda at, rows=rows: rows[at])
        for key, rows in batch.items()
    }
