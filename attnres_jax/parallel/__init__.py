"""Many devices and processes: the mesh, what lies where on it, and processes that are one run."""

from attnres_jax.parallel.mesh import (
    AXES,
    abstract_mesh,
    describe,
    make_mesh,
    mesh_sizes,
    mesh_that_fits,
    one_device_mesh,
)
from attnres_jax.parallel.pipeline import pipeline_gradients
from attnres_jax.parallel.sharding import (
    TABLE,
    batch_sharding,
    parameter_sharding,
    put_batch,
    replicated,
    use_mesh,
    with_shardings,
)
from attnres_jax.parallel.ticks import pipeline_ticks
from attnres_jax.parallel.transport import cached_transmissions, naive_transmissions

__all__ = [
    "AXES",
    "TABLE",
    "abstract_mesh",
    "batch_sharding",
    "cached_transmissions",
    "describe",
    "make_mesh",
    "mesh_sizes",
    "mesh_that_fits",
    "naive_transmissions",
    "one_device_mesh",
    "parameter_sharding",
    "pipeline_gradients",
    "pipeline_ticks",
    "put_batch",
    "replicated",
    "use_mesh",
    "with_shardings",
]
