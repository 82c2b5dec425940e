"""Logical axes: what layers and models call the axes of their arrays, and what a mesh makes of them, if there is one.

The code of a model names axes (`batch`, `sequence`, `heads`, ...) and no devices. Which mesh axes a name stands for is
said once, in the table of `parallel/sharding.py`, and put in force by `parallel.use_mesh`. Without a mesh, without a
table or on one device, everything here does nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

Table = tuple[tuple[str, tuple[str, ...]], ...]
"""For each logical axis the mesh axes that it is split over, outermost first."""

_TABLE = jax.make_user_context(default_value=())  # part of the key of every compiled program

HIDDEN = ("batch", "sequence", None)
"""Hidden states [B, T, D] between sublayers, and so the sources of the bank."""
ROW = ("batch", "length", None)
"""The input [B, T, D] of a sublayer's matmuls: every token of the sequence that is split over `tensor` elsewhere."""


@contextmanager
def table_in_force(table: Table) -> Iterator[None]:
    """Inside, `constrain` and `per_shard` follow the table, on the mesh that is set."""
    with _TABLE(table):
        yield


def constrain(x: Array, *names: str | None) -> Array:
    """`x`, split over devices along its named axes; the same values.

    An axis whose length its mesh axes do not divide, and one named None, is whole on every device. An array of another
    rank than names are given for (a step of decoding, say) is left as it is.
    """
    sizes = _mesh_axes()
    if not sizes or x.ndim != len(names):
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, names, sizes, _TABLE.value))


def split_of(shape: Sequence[int], *names: str | None) -> list[tuple[str, ...]]:
    """For each axis of an array of that shape the mesh axes that `constrain` splits it over."""
    return [axes or () for axes in _parts(shape, names, _mesh_axes(), _TABLE.value)]


def partition(
    shape: Sequence[int], names: Sequence[str | None], sizes: Mapping[str, int], table: Table
) -> PartitionSpec:
    """The mesh axes of every axis of an array.

    Args:
      shape: of the array.
      names: the logical name of each axis, or None.
      sizes: of the mesh axes.
      table: for each logical name its mesh axes; one that does not divide the axis, or splits an earlier one, is
        left out.
    """
    return PartitionSpec(*_parts(shape, names, sizes, table))


def mesh_axes_of(**lengths: int) -> dict[str, tuple[str, ...]]:
    """For logical axes of these lengths the mesh axes that each is split over; empty where there is no mesh."""
    sizes = _mesh_axes()
    return sizes and {name: _parts([n], [name], sizes, _TABLE.value)[0] or () for name, n in lengths.items()}


def mesh_platform() -> str | None:
    """What the devices of the mesh are: `cpu`, `gpu` or `tpu`; None: no mesh, or one of no devices in particular."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device and device.platform


def platform() -> str:
    """Where the computation runs: not where it is traced, if there is a mesh."""
    return mesh_platform() or jax.default_backend()


def per_shard(f: Callable, ins: Sequence[Any], outs: Any) -> Callable:
    """`f` on each device's own part of its arguments, split as `ins` say; what it returns is put together by `outs`.

    Both are partition specs, or trees of them where arguments are trees.
    """
    names = set(_mesh_axes())
    return jax.shard_map(f, in_specs=tuple(ins), out_specs=outs, axis_names=names, check_vma=False)


def _mesh_axes() -> dict[str, int]:
    """The mesh axes that the compiler splits over, with their sizes; none on one device or without a table."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _TABLE.value or mesh.empty or mesh.size == 1:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def _parts(shape, names, sizes, table) -> list[tuple[str, ...] | None]:
    known, taken, parts = dict(table), set(), []
    for length, name in zip(shape, names, strict=True):
        chosen: list[str] = []
        for axis in known.get(name, ()):
            own = math.prod(sizes[a] for a in chosen) * sizes.get(axis, 1)
            if sizes.get(axis, 1) > 1 and axis not in taken and length % own == 0:
                chosen.append(axis)
                taken.add(axis)
        parts.append(tuple(chosen) or None)
    return parts
