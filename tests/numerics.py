"""How tests compare arrays."""

import jax
import jax.numpy as jnp


def worst(left, right) -> float:
    """The largest relative difference of two pytrees' leaves, each in the norm of the leaf."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(jnp.linalg.norm((x - y).ravel()) / (jnp.linalg.norm(y.ravel()) + 1e-30)) for x, y in pairs)
