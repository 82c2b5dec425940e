"""Many devices: the mesh, and where parameters, activations and batches lie on it."""

from attnres_jax.parallel.mesh import (
    AXES,
    abstract_mesh,
    describe,
    make_mesh,
    mesh_sizes,
    mesh_that_fits,
    one_device_mesh,
)
from attnres_jax.parallel.pipeline import pipeline_gradients, pipeline_ticks
from attnres_jax.parallel.sharding import (
    TABLE,
    batch_sharding,
    data_share,
    parameter_sharding,
    put_batch,
    put_whole,
    replicated,
    use_mesh,
    with_shardings,
)
from attnres_jax.parallel.transport import cached_transmissions, naive_transmissions

__all__ = [
    "AXES",
    "TABLE",
    "abstract_mesh",
    "batch_sharding",
    "cached_transmissions",
    "data_share",
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
    "put_whole",
    "replicated",
    "use_mesh",
    "with_shardings",
]
