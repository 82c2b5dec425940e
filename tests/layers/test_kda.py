"""KDA against a NumPy float64 reading of its definition, over documents, and decoded token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import worst

from attnres_jax.layers import KDA, make_context

VARIANTS = {"linear": (None, False), "k3": (-5.0, True)}
SEGMENTS = np.array([[3] * 5 + [1] * 60 + [2] * 2, [1] * 67])


def make(variant, *, dtype="float32", conv_size=4, seed=0):
    bound, full_rank = VARIANTS[variant]
    settings = {"conv_size": conv_size, "gate_lower_bound": bound, "full_rank_gate": full_rank}
    layer = jax.jit(lambda: KDA(12, 3, 8, **settings, eps=1e-5, dtype=dtype, rngs=nnx.Rngs(seed)))()
    # Away from their initial values, where a forgotten scale would not show.
    layer.out_norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(7), (8,))
    layer.norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(8), (12,))
    layer.log_rate[...] = layer.log_rate[...] + 0.2
    return layer


run = jax.jit(lambda layer, h, context: layer(h, context))
prefill = jax.jit(lambda layer, h, state=None: layer.prefill(h, state))


def context_of(segment_ids, length):
    tokens = jnp.zeros((2, length), jnp.int32)
    return make_context(tokens, None if segment_ids is None else jnp.asarray(segment_ids), None, 8, 100.0)


def inputs(length, seed=1):
    return jax.random.normal(jax.random.key(seed), (2, length, 12))


def f64(x):
    return np.float64(x[...])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * f64(scale)


def decay_by_hand(layer, x):
    logits = x @ f64(layer.decay_down.kernel) @ f64(layer.decay_up.kernel) + f64(layer.decay_bias)
    logits, rate = logits.reshape(*x.shape[:-1], 3, 8), np.exp(f64(layer.log_rate))[:, None]
    if layer.gate_lower_bound is None:
        return -rate * np.log1p(np.exp(logits))
    return layer.gate_lower_bound * sigmoid(rate * logits)


def by_hand(layer, h, segments):
    x = rms_norm(np.float64(h), layer.norm.scale)

    def projected(linear, conv):
        y, taps = x @ f64(linear.kernel), f64(conv.taps)
        z = np.zeros_like(y)
        for b, t in np.ndindex(y.shape[:2]):
            for i in range(min(len(taps), t + 1)):
                z[b, t] += (segments[b, t - i] == segments[b, t]) * taps[-1 - i] * y[b, t - i]
        return (z * sigmoid(z)).reshape(*z.shape[:2], 3, 8)

    q, k = projected(layer.query, layer.query_conv), projected(layer.key, layer.key_conv)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    v, g = projected(layer.value, layer.value_conv), decay_by_hand(layer, x)
    beta = sigmoid(x @ f64(layer.beta.kernel))
    read = np.zeros_like(v)
    for b, head in np.ndindex(len(h), 3):
        state = np.zeros((8, 8))
        for t in range(h.shape[1]):
            if t and segments[b, t] != segments[b, t - 1]:
                state[:] = 0
            state = np.exp(g[b, t, head])[:, None] * state
            state += beta[b, t, head] * np.outer(k[b, t, head], v[b, t, head] - state.T @ k[b, t, head])
            read[b, t, head] = state.T @ q[b, t, head] / np.sqrt(8)
    gate = x @ f64(layer.gate.kernel) if layer.gate else x @ f64(layer.gate_down.kernel) @ f64(layer.gate_up.kernel)
    y = rms_norm(read, layer.out_norm.scale).reshape(*h.shape[:2], -1) * sigmoid(gate)
    return y @ f64(layer.out.kernel)


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_numpy_over_packed_documents(variant):
    layer, h = make(variant), inputs(67)
    found = run(layer, h, context_of(SEGMENTS, 67))
    np.testing.assert_allclose(found, by_hand(layer, h, SEGMENTS), rtol=0, atol=1e-5)


def test_without_segments_a_row_is_one_document():
    layer, h = make("linear"), inputs(67)
    bare = run(layer, h, context_of(None, 67))
    np.testing.assert_allclose(bare, run(layer, h, context_of(np.ones((2, 67), int), 67)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gates(variant):
    """Both gates over the whole range of their logits, the bounded one within its bound."""
    layer = make(variant)
    x = 30 * jax.random.normal(jax.random.key(3), (2, 50, 12))
    found = jax.jit(layer.log_decay)(x)
    np.testing.assert_allclose(found, decay_by_hand(layer, np.float64(x)), rtol=1e-4, atol=1e-5)
    assert float(found.max()) <= 0
    assert (float(found.min()) >= -5) == (variant == "k3")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bounded_gate_needs_one_form_of_the_delta_rule(variant):
    layer = make(variant)
    program = jax.make_jaxpr(lambda layer, h: layer(h, context_of(None, 20)))(layer, inputs(20))
    assert ("cond[" in str(program)) == (variant != "k3")


def test_initial_decays():
    """A of Kimi Linear is drawn from [1, 16], of the bounded gate 1; the bias gives time steps of [0.001, 0.1]."""
    layer = KDA(
        8, 64, 16, conv_size=4, gate_lower_bound=None, full_rank_gate=False, eps=1e-5, dtype="float32", rngs=nnx.Rngs(0)
    )
    rate, step = np.exp(layer.log_rate[...]), np.log1p(np.exp(f64(layer.decay_bias)))
    assert rate.min() >= 1 and rate.max() <= 16 and np.ptp(rate) > 8
    assert step.min() > 0.99e-3 and step.max() < 1.01e-1
    assert abs(np.median(np.log10(step)) + 2) < 0.1
    bounded = KDA(
        8, 4, 4, conv_size=4, gate_lower_bound=-5.0, full_rank_gate=True, eps=1e-5, dtype="float32", rngs=nnx.Rngs(0)
    )
    assert (bounded.log_rate[...] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefilled", [1, 2, 64, 65])
def test_prefill_and_steps_equal_one_forward_pass(variant, prefilled):
    layer, h = make(variant), inputs(68)
    whole = run(layer, h, context_of(None, 68))
    y, state = prefill(layer, h[:, :prefilled])
    reads, step = [y], jax.jit(layer.step)
    for t in range(prefilled, 68):
        y, state = step(h[:, t], state)
        reads.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(reads, 1), whole, rtol=0, atol=3e-6)
    _, expected = prefill(layer, h)
    assert worst(state, expected) < 1e-5


def test_a_prefill_goes_on_from_a_state():
    layer, h = make("linear"), inputs(67)
    whole, expected = prefill(layer, h)
    first, state = prefill(layer, h[:, :30])
    second, state = prefill(layer, h[:, 30:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=0, atol=3e-6)
    assert worst(state, expected) < 1e-5


def test_gradients_are_causal_and_stay_in_the_document():
    layer, h, context = make("linear"), inputs(67), context_of(SEGMENTS, 67)
    gradient = jax.jit(jax.grad(lambda h, t: jnp.sum(layer(h, context)[:, t])))
    for t in (4, 5, 40, 66):
        bar = gradient(h, t)
        size = np.abs(bar).max(-1)
        seen = (SEGMENTS[:, t, None] == SEGMENTS) & (np.arange(67) <= t)
        assert (size[~seen] == 0).all() and (size[seen] > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant):
    layer, h, context = make(variant), inputs(20), context_of(None, 20)
    bars = jax.jit(jax.grad(lambda layer: jnp.sum(jnp.sin(layer(h, context)))))(layer)
    assert all(bool(jnp.isfinite(bar).all()) and float(jnp.abs(bar).max()) > 0 for bar in jax.tree.leaves(bars))


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(variant):
    layer, exact, h = make(variant, dtype="bfloat16"), make(variant), inputs(67)
    y, state = prefill(layer, h.astype(jnp.bfloat16))
    assert y.dtype == state.key_inputs.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    assert worst(y.astype(jnp.float32), run(exact, h, context_of(None, 67))) < 0.03
    token, after = jax.jit(layer.step)(h[:, 0].astype(jnp.bfloat16), state)
    assert token.dtype == jnp.bfloat16 and [x.dtype for x in after] == [x.dtype for x in state]


def test_stacked_layers_scan():
    """As the decoder runs them: one module whose leaves have a leading axis."""
    settings = {"conv_size": 4, "gate_lower_bound": None, "full_rank_gate": False, "eps": 1e-5, "dtype": "float32"}
    draw = jax.vmap(lambda key: KDA(12, 3, 8, **settings, rngs=nnx.Rngs(key)))
    stack = jax.jit(draw)(jax.random.split(jax.random.key(0), 2))
    h, context = inputs(10), context_of(None, 10)
    scanned, _ = jax.lax.scan(lambda h, layer: (h + layer(h, context), None), h, stack)
    for i in range(2):
        h = h + run(jax.tree.map(lambda leaf, i=i: leaf[i], stack), h, context)
    np.testing.assert_allclose(scanned, h, rtol=0, atol=1e-5)
