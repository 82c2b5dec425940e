"""Sublayers against independent NumPy float64 readings of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.layers import (
    Embedding,
    GroupedQueryAttention,
    Llama3Scaling,
    RMSNorm,
    SwiGLU,
    YarnScaling,
    make_context,
)
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.rotary import rotary_tables, rotate

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def f64(x):
    return np.asarray(x, np.float64)


def rms_norm(x, scale, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * f64(scale)


def turned(x, positions, theta=100.0):
    """Rotary embedding as complex multiplication."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def attention_by_hand(layer, h, segments, positions, num_kv_heads):
    x = rms_norm(f64(h), layer.norm.scale[...])
    heads = [
        (x @ f64(p.kernel[...])).reshape(*x.shape[:2], -1, layer.head_dim)
        for p in (layer.query, layer.key, layer.value)
    ]
    query, key, value = heads
    if layer.query_norm is not None:
        query, key = rms_norm(query, layer.query_norm.scale[...]), rms_norm(key, layer.key_norm.scale[...])
    query, key = turned(query, positions), turned(key, positions)
    group = query.shape[2] // num_kv_heads
    out = np.zeros_like(query)
    for b, t, head in np.ndindex(query.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([query[b, t, head] @ key[b, s, head // group] for s in seen]) / np.sqrt(layer.head_dim)
        weights = np.exp(scores - scores.max())
        out[b, t, head] = (weights / weights.sum()) @ value[b, seen, head // group]
    return out.reshape(*x.shape[:2], -1) @ f64(layer.out.kernel[...])


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("qk_norm, num_kv_heads", [(True, 2), (False, 4)])
def test_attention_and_its_packing_mask(implementation, qk_norm, num_kv_heads):
    options = {"qk_norm": qk_norm, "eps": 1e-6, "dtype": "float32", "implementation": implementation}
    layer = GroupedQueryAttention(16, 4, num_kv_heads, 6, **options, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(1), (2, 8, 16))
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], range(8)])
    y = layer(h, make_context(h[..., 0].astype(int), SEGMENTS, positions, 6, 100.0))
    expected = attention_by_hand(layer, h, np.asarray(SEGMENTS), np.asarray(positions), num_kv_heads)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


def test_without_segments_a_row_is_one_document():
    layer = GroupedQueryAttention(
        16, 2, 2, 8, qk_norm=True, eps=1e-6, dtype="float32", implementation="xla", rngs=nnx.Rngs(0)
    )
    h = jax.random.normal(jax.random.key(1), (1, 5, 16))
    tokens = jnp.zeros((1, 5), int)
    bare = layer(h, make_context(tokens, None, None, 8, 100.0))
    np.testing.assert_allclose(bare, layer(h, make_context(tokens, tokens, None, 8, 100.0)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        bare, attention_by_hand(layer, h, np.zeros((1, 5)), np.arange(5)[None], 2), rtol=0, atol=2e-6
    )


def test_rotation_is_by_relative_position():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 8))
    tables = rotary_tables(jnp.arange(9)[None], 8, 100.0)
    query, key = rotate(x[:, :1].repeat(9, 1), *tables), rotate(y[:, :1].repeat(9, 1), *tables)
    products = jnp.einsum("bthk,bshk->ts", query, key)
    for shift in range(1, 5):
        diagonal = jnp.diagonal(products, shift)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)


def llama3_by_hand(head_dim, theta, scaling):
    """By wavelengths, a frequency at a time."""
    longest = scaling.original_length / scaling.low_frequency_factor
    shortest = scaling.original_length / scaling.high_frequency_factor
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < shortest:
            yield frequency
        elif wavelength > longest:
            yield frequency / scaling.factor
        else:
            smooth = scaling.original_length / wavelength - scaling.low_frequency_factor
            smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
            yield (1 - smooth) * frequency / scaling.factor + smooth * frequency


def yarn_by_hand(head_dim, theta, scaling):
    """The index at which a frequency turns so many times within the original length, and a ramp between two of them."""
    indices = [
        np.log(scaling.original_length / (2 * np.pi * turns)) / np.log(theta) * head_dim / 2
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = np.floor(indices[0]), np.ceil(indices[1])
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        slow = min(max((i - low) / (high - low), 0), 1)
        yield frequency / scaling.factor * slow + frequency * (1 - slow)


@pytest.mark.parametrize(
    "scaling, by_hand, theta, amplitude",
    [
        (Llama3Scaling(), llama3_by_hand, 500000.0, 1.0),
        (Llama3Scaling(32.0, 1.0, 4.0, 8192), llama3_by_hand, 500000.0, 1.0),
        (YarnScaling(40.0, mscale=1.0, mscale_all_dim=1.0), yarn_by_hand, 10000.0, 1.0),
        (YarnScaling(4.0, 32768), yarn_by_hand, 1000000.0, 0.1 * np.log(4) + 1),
    ],
)
def test_scaled_frequencies(scaling, by_hand, theta, amplitude):
    cos, sin = rotary_tables(jnp.array([[0, 1]]), 128, theta, scaling)
    frequencies = np.fromiter(by_hand(128, theta, scaling), float)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1, 0], frequencies, rtol=1e-5)
    np.testing.assert_allclose(np.hypot(sin, cos), amplitude, rtol=1e-6)
    kept, divided = theta ** (-2 * np.array([0, 63]) / 128) / frequencies[[0, -1]]
    np.testing.assert_allclose((kept, divided), (1, scaling.factor), rtol=1e-5)


@pytest.mark.parametrize(
    "theta, length, ramp",
    [
        (10000.0, 64, (0, 17)),  # and not from -8: the fastest is kept
        (5.0, 332, (19, 127)),  # and not to 158, which the head has not
        (10000.0, 4, (0, 1e-3)),  # to -3: all but the fastest are divided
        (10.0, 40960, (63, 64)),  # from 147: none is
    ],
)
def test_the_ramp_of_yarn_stays_within_the_head(theta, length, ramp):
    cos, sin = rotary_tables(jnp.array([[1]]), 128, theta, YarnScaling(4.0, length))
    frequencies, divided = theta ** (-np.arange(64) / 64), np.interp(np.arange(64), ramp, (0, 1))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, 0], frequencies * (1 - divided * 3 / 4), rtol=1e-5)


def test_softmax_multiplier_of_yarn():
    assert YarnScaling(40.0, mscale=1.0, mscale_all_dim=1.0).softmax_multiplier == (0.1 * np.log(40) + 1) ** 2
    assert YarnScaling(40.0).softmax_multiplier == YarnScaling(1.0, mscale_all_dim=1.0).softmax_multiplier == 1


def test_interleaved_pairs_give_the_products_of_turned_neighbours():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 5, 1, 8))
    tables = rotary_tables(jnp.arange(5)[None], 8, 100.0)
    left, right = (rotate(jnp.asarray(v, jnp.float32), *tables, interleaved=True) for v in (x, y))
    angles = np.arange(5)[:, None] * 100.0 ** (-np.arange(4) / 4)
    z, w = ((v[0, :, 0, 0::2] + 1j * v[0, :, 0, 1::2]) * np.exp(1j * angles) for v in (x, y))
    expected = np.real(z @ w.conj().T)
    np.testing.assert_allclose(jnp.einsum("bthk,bshk->ts", left, right), expected, rtol=1e-4, atol=1e-5)


def test_mlp_and_norm():
    layer = SwiGLU(8, 12, eps=1e-6, dtype="float32", rngs=nnx.Rngs(3))
    h = 5 * jax.random.normal(jax.random.key(1), (2, 3, 8))
    x = rms_norm(f64(h), layer.norm.scale[...])
    gate = x @ f64(layer.gate.kernel[...])
    expected = (gate / (1 + np.exp(-gate)) * (x @ f64(layer.up.kernel[...]))) @ f64(layer.down.kernel[...])
    np.testing.assert_allclose(layer(h, None), expected, rtol=0, atol=3e-6)
    norm = RMSNorm(8, 1e-6, "bfloat16")
    assert norm(h).dtype == jnp.bfloat16


def test_embeddings_have_a_standard_deviation_of_a_fiftieth():
    table = Embedding(512, 64, "float32", rngs=nnx.Rngs(0)).table[...]
    assert abs(float(table.std()) - 0.02) < 4e-4 and abs(float(table.mean())) < 4e-4


def test_linear_maps_keep_the_variance_of_their_input():
    layer = SwiGLU(512, 1024, eps=1e-6, dtype="float32", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 512))
    assert abs(float(layer.gate(x).std()) - 1) < 0.02


def test_kernel_gradient_by_hand_equals_jax():
    """Values and gradients of x @ W written plainly, for rows with and without batch axes."""
    layer = Linear(6, 10, rngs=nnx.Rngs(0))
    for shape in ((6,), (4, 6), (2, 3, 6)):
        x = jax.random.normal(jax.random.key(1), shape)
        plain = lambda x, kernel: jnp.sum(jnp.sin(x @ kernel))  # noqa: E731
        expected = jax.value_and_grad(plain, argnums=(0, 1))(x, layer.kernel[...])
        value, (x_bar, bars) = jax.value_and_grad(lambda x, m: jnp.sum(jnp.sin(m(x))), argnums=(0, 1))(x, layer)
        for found, wanted in zip((value, x_bar, bars.kernel[...]), (expected[0], *expected[1]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
