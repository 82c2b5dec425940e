"""Shares and their entropy, of NumPy and JAX arrays, against hand-made values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax.depth.shares import entropy, shares


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_a_source_counts_by_how_strongly_it_is_read_with_either_sign(array):
    parts = shares(array([[2.0, 0.0, 0.0], [-1.0, 0.0, 5.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(parts, [[0.5, 0, 0], [0.25, 0, 1], [0.25, 0, 0]])
    np.testing.assert_allclose(entropy(parts), [1.5 * np.log(2), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(entropy(array([[0.25] * 4, [0, 0, 0.5, 0.5]]), axis=1), np.log([4, 2]), rtol=1e-6)


def test_softmax_weights_are_their_own_shares_under_jit():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (5, 3)), axis=0)
    np.testing.assert_allclose(jax.jit(shares)(weights), weights, rtol=1e-6)
    expected = jax.scipy.special.entr(weights).sum(0)
    np.testing.assert_allclose(jax.jit(lambda x: entropy(shares(x)))(weights), expected, rtol=1e-6)
