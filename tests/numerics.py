"""How tests compare arrays."""

import jax
import numpy as np


def worst(left, right) -> float:
    """The largest relative difference of two pytrees' leaves, each in the norm of the leaf; NaN if any leaf has one."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return float(np.max([_difference(x, y) for x, y in zip(*map(jax.tree.leaves, (left, right)), strict=True)]))


def _difference(x, y) -> float:
    x, y = (np.asarray(each).astype(np.float64) for each in (x, y))
    assert x.shape == y.shape
    return np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30)
