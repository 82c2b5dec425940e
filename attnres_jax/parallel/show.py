"""Prints where the parameters of a configuration lie, and what they take on each device.

python -m attnres_jax.parallel.show --config=configs/tiny.py [--config.mesh.fsdp=4 ...] [--devices=64]

The devices need not be there, and nothing is computed. Without --devices they are this machine's, or as few as make up
the mesh.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import PartitionSpec

from attnres_jax.cli import launch
from attnres_jax.config import Config, load_config
from attnres_jax.models import Decoder, named_leaves
from attnres_jax.parallel.mesh import AXES, abstract_mesh, asked_sizes
from attnres_jax.parallel.sharding import TABLE, batch_sharding, logical_axes, with_shardings


def placement(config: Config, num_devices: int) -> str:
    """The table that is printed.

    Raises:
      ConfigError: if so many devices do not make up the mesh that `config.mesh` asks for.
    """
    mesh = abstract_mesh(config, num_devices)
    model = with_shardings(mesh, jax.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))))
    rows, whole, own = [("parameter", "shape", "logical axes", "mesh axes", "bytes per device")], 0, 0
    for name, leaf in named_leaves(model).items():
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole, own = whole + math.prod(leaf.shape) * leaf.dtype.itemsize, own + local
        shape = " x ".join(map(str, leaf.shape))
        logical = ", ".join(axis or "-" for axis in logical_axes(name, leaf.ndim))
        rows.append((name, shape, logical, _mesh_axes(leaf.sharding.spec, leaf.ndim), f"{local:,}"))
    rows.append((f"all, of {whole:,}", "", "", "", f"{own:,}"))
    batch = config.data.batch_size // config.training.accumulation, config.data.sequence_length
    rows_here, tokens_here = batch_sharding(mesh, batch).shard_shape(batch)
    return "\n".join(
        [
            "mesh: " + ", ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES),
            *_aligned([(f"{name}:", " * ".join(axes)) for name, axes in TABLE]),
            "",
            *_aligned(rows, right=(4,)),
            f"AdamW's moments lie like the parameters and take {2 * own:,} bytes more. A device has {rows_here} x "
            f"{tokens_here} tokens of each micro-batch.",
        ]
    )


def main(arguments: list[str], overrides: list[str]) -> None:
    """Config, table."""
    if arguments:
        raise flags.Error(f"argument {arguments[0]!r} is not understood; settings are given as --config.key=value")
    config = load_config(flags.FLAGS.config, overrides)
    print(placement(config, flags.FLAGS.devices or default_devices(config, jax.device_count())))


def default_devices(config: Config, here: int) -> int:
    """The number of devices `here` if they make up the mesh, or of the fewest that do."""
    asked = asked_sizes(config.mesh).values()
    fewest = math.prod(size for size in asked if size > 0)
    return here if here == fewest or (min(asked) < 0 and here % fewest == 0) else fewest


def _mesh_axes(spec: PartitionSpec, ndim: int) -> str:
    parts: Iterator[Any] = (spec[i] if i < len(spec) else None for i in range(ndim))
    return ", ".join("*".join([part] if isinstance(part, str) else part) if part else "-" for part in parts)


def _aligned(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    widths = np.max([[len(cell) for cell in row] for row in rows], axis=0)
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file and its argument, as in configs/tiny.py:residual=block.")
    flags.DEFINE_integer(
        "devices", None, "How many devices; if not given, this machine's or the fewest that work.", lower_bound=1
    )
    flags.mark_flag_as_required("config")
    launch(main)
