"""Latent attention against a float64 NumPy reading: full and absorbed form, packed documents, rotation, gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.layers import MLA, make_context

HEADS, LATENT, NOPE, ROPE, VALUE, WIDTH = 3, 10, 6, 4, 5, 16
KINDS = {
    "kimi linear": {},
    "kimi k3": {"query_rank": 7, "output_gate": True},
    "deepseek": {"query_rank": 7, "rotary": True, "rotary_interleaved": True, "scale_multiplier": 1.3},
    "rotated halves": {"rotary": True},
}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], range(8)])
THETA = 100.0


def make(kind, dtype="float32", seed=0):
    sizes = {"latent_dim": LATENT, "nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE}
    layer = jax.jit(lambda: MLA(WIDTH, HEADS, **sizes, eps=1e-5, dtype=dtype, rngs=nnx.Rngs(seed), **KINDS[kind]))()
    for i, norm in enumerate(filter(None, (layer.norm, layer.latent_norm, layer.query_norm))):
        norm.scale[...] = 1 + 0.2 * jax.random.normal(jax.random.key(i), norm.scale.shape)
    return layer


run = jax.jit(lambda layer, h, context: layer(h, context))


def context(segments=SEGMENTS, positions=POSITIONS):
    segments = None if segments is None else jnp.asarray(segments)
    return make_context(jnp.asarray(positions), segments, jnp.asarray(positions), ROPE, THETA)


def hidden(tokens=8):
    return 3 * jax.random.normal(jax.random.key(1), (2, tokens, WIDTH))


def f64(parameter):
    return np.asarray(parameter[...], np.float64)


def rms_norm(x, norm, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * f64(norm.scale)


def turned(x, positions, interleaved):
    """[B, T, ..., ROPE] by complex multiplication."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., : ROPE // 2] + 1j * x[..., ROPE // 2 :]
    angles = positions[..., None] * THETA ** (-np.arange(ROPE // 2) / (ROPE // 2))
    pairs = pairs * np.exp(1j * angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), ROPE // 2))
    return np.concatenate([pairs.real, pairs.imag], -1)


def by_hand(layer, h, options, segments=SEGMENTS, positions=POSITIONS):
    x = rms_norm(np.asarray(h, np.float64), layer.norm, 1e-5)
    if "query_rank" in options:
        query = rms_norm(x @ f64(layer.query_down.kernel), layer.query_norm, 1e-6) @ f64(layer.query_up.kernel)
    else:
        query = x @ f64(layer.query.kernel)
    query = query.reshape(*x.shape[:2], HEADS, NOPE + ROPE)
    both = x @ f64(layer.latent.kernel)
    latent, shared = rms_norm(both[..., :LATENT], layer.latent_norm, 1e-6), both[..., LATENT:]
    expanded = (latent @ f64(layer.expand.kernel)).reshape(*x.shape[:2], HEADS, NOPE + VALUE)
    if options.get("rotary"):
        interleaved = options.get("rotary_interleaved", False)
        shared = turned(shared, positions, interleaved)
        query = np.concatenate([query[..., :NOPE], turned(query[..., NOPE:], positions, interleaved)], -1)
    scale = options.get("scale_multiplier", 1.0) / np.sqrt(NOPE + ROPE)
    out = np.zeros((*x.shape[:2], HEADS, VALUE))
    for b, t, head in np.ndindex(out.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        keys = [np.concatenate([expanded[b, s, head, :NOPE], shared[b, s]]) for s in seen]
        weights = np.exp(scale * np.array([query[b, t, head] @ key for key in keys]))
        out[b, t, head] = weights / weights.sum() @ expanded[b, seen, head, NOPE:]
    out = out.reshape(*x.shape[:2], -1)
    if options.get("output_gate"):
        out = out / (1 + np.exp(-x @ f64(layer.gate.kernel)))
    return out @ f64(layer.out.kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_full_form_and_its_packing_mask(kind):
    layer, h = make(kind), hidden()
    np.testing.assert_allclose(run(layer, h, context()), by_hand(layer, h, KINDS[kind]), rtol=0, atol=5e-6)


def test_without_segments_a_row_is_one_document():
    layer, h = make("kimi linear"), hidden()
    expected = by_hand(layer, h, {}, np.ones((2, 8)))
    np.testing.assert_allclose(run(layer, h, context(None)), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("prompt", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_token_by_token_equals_the_full_form(kind, prompt):
    """From an empty cache, and from prefilled ones that end within and at the end of a document."""
    layer, h = make(kind), hidden()
    whole = run(layer, h, context())
    at = lambda part: context(SEGMENTS[:, part], POSITIONS[:, part])  # noqa: E731
    y, cache = layer.prefill(h[:, :prompt], at(slice(prompt)), 11) if prompt else (None, layer.empty_cache(2, 11))
    if prompt:
        np.testing.assert_allclose(y, whole[:, :prompt], rtol=0, atol=5e-6)
    step = jax.jit(lambda h, context, cache: layer.step(h, context, cache))
    for t in range(prompt, 8):
        y, cache = step(h[:, t : t + 1], at(slice(t, t + 1)), cache)
        np.testing.assert_allclose(y[:, 0], whole[:, t], rtol=0, atol=5e-6)
    assert cache.length.tolist() == [8, 8]


def test_several_tokens_in_one_step():
    layer, h = make("kimi k3"), hidden()
    part = slice(2, 8)
    _, cache = layer.prefill(h[:, :2], context(SEGMENTS[:, :2], POSITIONS[:, :2]), 8)
    y, _ = layer.step(h[:, part], context(SEGMENTS[:, part], POSITIONS[:, part]), cache)
    np.testing.assert_allclose(y, run(layer, h, context())[:, part], rtol=0, atol=5e-6)


def test_prompts_of_different_lengths():
    """What follows a shorter prompt in its row is overwritten, and never seen."""
    layer, h = make("deepseek"), hidden()
    lengths = jnp.array([2, 4])
    positions = np.broadcast_to(np.arange(8), (2, 8))
    garbage = jnp.where(jnp.arange(5)[None, :, None] < lengths[:, None, None], h[:, :5], 1e3)
    _, cache = layer.prefill(garbage, context(None, positions[:, :5]), 8, lengths)
    whole = run(layer, h, context(None, positions))
    for _ in range(3):
        now = cache.length
        y, cache = layer.step(h[jnp.arange(2), now][:, None], context(None, np.asarray(now)[:, None]), cache)
        np.testing.assert_allclose(y[:, 0], whole[jnp.arange(2), now], rtol=0, atol=5e-6)


def test_the_cache_is_one_latent_and_one_shared_key_a_token():
    cache = make("kimi linear", "bfloat16").empty_cache(2, 6)
    assert cache.latent.shape == (2, 6, LATENT) and cache.shared_key.shape == (2, 6, ROPE)
    assert cache.latent.dtype == cache.shared_key.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="5 places cannot hold a prompt of 8"):
        make("kimi linear").prefill(hidden(), context(), 5)


def test_tables_of_another_width_are_refused():
    with pytest.raises(ValueError, match="head_dim=4"):
        make("deepseek")(hidden(), make_context(jnp.asarray(POSITIONS), None, None, 8, THETA))


def test_without_rotation_positions_do_not_matter():
    layer, h = make("kimi linear"), hidden()
    np.testing.assert_array_equal(run(layer, h, context()), run(layer, h, context(positions=POSITIONS + 5)))


def test_gradients_are_those_of_the_documents():
    """No token hears another document or its own future; finite under the mask."""
    layer, h = make("kimi k3"), hidden()
    gradient = jax.jit(jax.grad(lambda h, t: jnp.sum(layer(h, context())[:, t])))
    for t in range(8):
        heard = np.abs(gradient(h, t)).sum(-1) > 0
        for b in range(2):
            assert heard[b].tolist() == [s <= t and SEGMENTS[b, s] == SEGMENTS[b, t] for s in range(8)]


def test_a_stack_scans_in_half_precision():
    stack = jax.vmap(lambda key: make("deepseek", "bfloat16", key))(jax.random.split(jax.random.key(0), 3))
    h = hidden().astype(jnp.bfloat16)

    @jax.jit
    def value(stack):
        y, _ = jax.lax.scan(lambda h, layer: (h + layer(h, context()), None), h, stack)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    bars = jax.grad(value)(stack)
    assert bars.expand.kernel.shape == (3, LATENT, HEADS * (NOPE + VALUE))
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(bars))
    layer = make("kimi k3", "bfloat16")
    y = run(layer, hidden(), context())
    assert y.dtype == jnp.bfloat16
    expected = by_hand(layer, hidden(), KINDS["kimi k3"])
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < 0.02 * np.linalg.norm(expected)
