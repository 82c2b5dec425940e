"""Splash attention, interpreted, against XLA's attention; and which kernel is taken where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.errors import ConfigError
from attnres_jax.layers import MLA, make_context, mla, softmax_attention
from attnres_jax.layers.softmax_attention import attend, implementation_for

B, T, H, K = 2, 256, 4, 24
ENDS = np.array([100, 250])  # of each row's first document, in the first block and in the second


def context(packed):
    segments = jnp.asarray(1 + (np.arange(T) >= ENDS[:, None]))
    return make_context(segments, segments if packed else None, None, 8, 100.0)


def weighed(implementation, packed, scale, query, key, value):
    """Something of what is read, whose gradient differs from token to token, and what is read."""
    y = attend(query, key, value, context(packed), implementation=implementation, scale=scale)
    return jnp.sum(jnp.sin(y)), y


@pytest.mark.parametrize("packed, kv_heads, scale", [(True, 2, None), (False, 4, 0.3)])
def test_splash_is_what_xla_computes(packed, kv_heads, scale):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (B, T, n, K)) for k, n in zip(keys, (H, kv_heads, kv_heads), strict=True))
    splash, xla = (
        jax.jit(jax.grad(functools.partial(weighed, name, packed, scale), (0, 1, 2), has_aux=True))(query, key, value)
        for name in ("splash", "xla")
    )
    for ours, theirs in zip(jax.tree.leaves(splash), jax.tree.leaves(xla), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * float(jnp.abs(theirs).max()))


def test_latent_attention_by_splash(monkeypatch):
    """Heads' own and shared parts of keys in one, values of another width: still the full form."""
    sizes = {"latent_dim": 10, "nope_dim": 12, "rope_dim": 4, "value_dim": 8}
    layer = MLA(16, 2, **sizes, eps=1e-5, scale_multiplier=1.3, dtype="float32", rngs=nnx.Rngs(0))
    h = 3 * jax.random.normal(jax.random.key(1), (B, T, 16))
    plain = layer(h, context(packed=True))
    monkeypatch.setattr(mla, "implementation_for", lambda name, query: "splash")
    splash = layer(h, context(packed=True))
    np.testing.assert_allclose(splash, plain, rtol=0, atol=3e-6 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize(
    "name, platform, shape, dtype, expected",
    [
        ("auto", "tpu", (1, 384, 2, 4), "float32", "splash"),
        ("auto", "tpu", (1, 200, 2, 4), "bfloat16", "xla"),
        ("auto", "gpu", (1, 384, 2, 32), "bfloat16", "cudnn"),
        ("auto", "gpu", (1, 384, 2, 32), "float32", "xla"),
        ("auto", "gpu", (1, 384, 2, 20), "bfloat16", "xla"),
        ("auto", "gpu", (1, 384, 2, 320), "bfloat16", "xla"),
        ("auto", "gpu", (1, 127, 2, 32), "bfloat16", "xla"),
        ("auto", "cpu", (1, 384, 2, 32), "bfloat16", "xla"),
        ("xla", "tpu", (1, 384, 2, 4), "float32", "xla"),
    ],
)
def test_the_kernel_is_that_of_the_devices(monkeypatch, name, platform, shape, dtype, expected):
    monkeypatch.setattr(softmax_attention, "platform", lambda: platform)
    assert implementation_for(name, jnp.zeros(shape, dtype)) == expected


@pytest.mark.parametrize(
    "name, platform, shape, dtype, message",
    [
        ("splash", "cpu", (1, 384, 2, 4), "float32", "needs a TPU, and this is a cpu"),
        ("splash", "tpu", (1, 200, 2, 4), "float32", "needs a multiple of 128 tokens on a device, not 200"),
        ("cudnn", "cpu", (1, 384, 2, 32), "bfloat16", "needs a GPU, and this is a cpu"),
        ("cudnn", "gpu", (1, 384, 2, 32), "float32", "needs model.dtype='bfloat16', not 'float32'"),
        ("cudnn", "gpu", (1, 384, 2, 20), "bfloat16", "needs heads of a multiple of 8 channels up to 128, not of 20"),
        ("cudnn", "gpu", (1, 127, 2, 32), "bfloat16", "needs an even number of tokens, not 127"),
    ],
)
def test_a_kernel_that_cannot_run_is_one_line(monkeypatch, name, platform, shape, dtype, message):
    monkeypatch.setattr(softmax_attention, "platform", lambda: platform)
    with pytest.raises(ConfigError, match=f"model.attention='{name}' {message}") as raised:
        implementation_for(name, jnp.zeros(shape, dtype))
    assert "\n" not in str(raised.value)
