"""The short convolution against NumPy float64, over documents, and continued from its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import worst

from attnres_jax.layers.convolution import ShortConvolution

SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 3, 3, 1], [4, 4, 4, 4, 4, 4, 4, 4, 4]])


def by_hand(conv, x, segments):
    x, taps, y = np.float64(x), np.float64(conv.taps[...]), np.zeros(x.shape)
    for b, t in np.ndindex(x.shape[:2]):
        for i in range(len(taps)):
            if t - i >= 0 and (segments[b, t - i : t + 1] == segments[b, t]).all():
                y[b, t] += taps[len(taps) - 1 - i] * x[b, t - i]
    return y / (1 + np.exp(-y))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_against_numpy(size, length):
    conv = ShortConvolution(6, size, rngs=nnx.Rngs(0))
    x, segments = jax.random.normal(jax.random.key(1), (2, length, 6)), SEGMENTS[:, :length]
    packed, _ = conv(x, conv.init_state(2, "float32"), segments)
    np.testing.assert_allclose(packed, by_hand(conv, x, np.asarray(segments)), rtol=0, atol=1e-6)
    whole, _ = conv(x, conv.init_state(2, "float32"))
    np.testing.assert_allclose(whole, by_hand(conv, x, np.zeros((2, length))), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_goes_on_from_its_state(cut):
    """Two rows, or a row and single tokens, equal the one row; the inputs' gradients too."""
    conv = ShortConvolution(6, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 6))

    def in_two(x):
        first, state = conv(x[:, :cut], conv.init_state(2, "float32"))
        second, state = conv(x[:, cut:], state)
        return jnp.concatenate([first, second], 1), state

    def in_steps(x):
        first, state = conv(x[:, :cut], conv.init_state(2, "float32"))
        tokens = []
        for t in range(cut, 9):
            token, state = conv.step(x[:, t], state)
            tokens.append(token)
        return jnp.concatenate([first, jnp.stack(tokens, 1)], 1), state

    in_one = lambda x: conv(x, conv.init_state(2, "float32"))  # noqa: E731
    expected, pull = jax.vjp(in_one, x)
    for form in (in_two, in_steps):
        found, found_pull = jax.vjp(form, x)
        assert worst(found, expected) < 1e-6
        assert worst(found_pull(expected), pull(expected)) < 1e-6


def test_the_state_holds_nothing_of_an_earlier_document():
    conv = ShortConvolution(6, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 6))
    _, state = conv(x, conv.init_state(2, "float32"), SEGMENTS)
    np.testing.assert_array_equal(state[0], [*np.zeros((2, 6)), x[0, 8]])
    np.testing.assert_array_equal(state[1], x[1, 6:])


def test_half_precision_sums_in_float32():
    conv = ShortConvolution(6, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 6)).astype(jnp.bfloat16)
    y, state = conv(x, conv.init_state(2, "bfloat16"))
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, conv(x.astype(jnp.float32), state.astype(jnp.float32) * 0)[0].astype(jnp.bfloat16))


def test_taps_stored_in_half_precision_sum_in_float32_too():
    conv, wide = (ShortConvolution(6, 4, rngs=nnx.Rngs(0)) for _ in range(2))
    conv.taps[...] = conv.taps[...].astype(jnp.bfloat16)
    wide.taps[...] = conv.taps[...].astype(jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 9, 6))
    state = jax.random.normal(jax.random.key(2), (2, 3, 6))
    for got, want in zip(conv(x, state), wide(x, state), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(conv.step(x[:, 0], state)[0], wide.step(x[:, 0], state)[0])
