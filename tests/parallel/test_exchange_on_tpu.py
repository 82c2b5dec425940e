"""The routed exchange compiled ahead of time for four TPU chips: the collective that no CPU runs, both directions."""

import pytest
from tpu_compiler import needs_libtpu, run_python

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from attnres_jax.config import Config, MeshConfig, ModelConfig, MoEConfig
from attnres_jax.layers.expert_exchange import experts_across_devices
from attnres_jax.parallel import make_mesh, use_mesh
from attnres_jax.parallel.chips import slice_devices

B, T, K, D, E, F = 8, 512, 2, 256, 16, 128
devices, _ = slice_devices("v5p:2x2x1")
model = ModelConfig(mlp_layers="moe", moe=MoEConfig(num_experts=E))

def loss(x, weights, gate, up, down, indices, valid):
    y, computed = experts_across_devices(
        x, indices, weights, gate, up, down, valid=valid, activation="silu", implementation="auto"
    )
    return jnp.sum(y**2), computed

with use_mesh(make_mesh(Config(model=model, mesh=MeshConfig(expert=4)), devices)) as mesh:
    place = NamedSharding(mesh, PartitionSpec("expert"))
    shapes = [
        ((B, T, D), jnp.bfloat16), ((B, T, K), jnp.float32), ((E, D, F), jnp.float32), ((E, D, F), jnp.float32),
        ((E, F, D), jnp.float32), ((B, T, K), jnp.int32), ((B, T), jnp.bool_),
    ]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    for argnums in ((), (0, 1, 2, 3, 4)):
        f = jax.grad(loss, argnums, has_aux=True) if argnums else loss
        lowered = jax.jit(f).lower(*arguments)
        lowered.compile()
        print(lowered.as_text().count("@ragged_all_to_all("))
"""


@pytest.mark.slow
@needs_libtpu
def test_the_collective_compiles_forward_and_backward():
    """`auto` takes it there: for two experts a token on four chips fewer bytes travel."""
    run = run_python("-c", PROGRAM)
    assert run.returncode == 0
    assert run.stdout.split() == ["2", "4"]  # there and back; and each once more for the gradients
