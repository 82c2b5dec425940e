"""The mixture-of-experts layer against float64 NumPy readings of DeepSeek-V3's, Qwen3's and Kimi K3's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.layers import MoE, make_context

KINDS = {
    "kimi linear": {"num_shared": 1, "scaling": 2.446},
    "remote code": {"num_shared": 1, "scaling": 2.446, "biased_weights": True},
    "deepseek v3": {"num_shared": 1, "scaling": 2.5, "num_groups": 4, "top_groups": 2},
    "qwen3": {"router_activation": "softmax"},
    "kimi k3": {"num_shared": 2, "scaling": 2.0, "latent_width": 6, "activation": "situ"},
    "k3 without norm": {"num_shared": 1, "shared_width": 3, "latent_width": 6, "latent_norm": False},
}
EPS = 1e-5


def make(kind, dtype="float32", seed=0, **options):
    options = KINDS[kind] | options
    layer = jax.jit(lambda: MoE(10, 8, 2, 7, eps=EPS, dtype=dtype, rngs=nnx.Rngs(seed), **options))()
    layer.correction_bias[...] = 0.3 * jax.random.normal(jax.random.key(7), (8,))
    layer.norm.scale[...] = 1 + 0.2 * jax.random.normal(jax.random.key(8), (10,))
    return layer


run = jax.jit(lambda layer, h, context: layer(h, context))


def f64(parameter):
    return np.asarray(parameter[...], np.float64)


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * f64(norm.scale)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated(x, gate, up, down, activation):
    left, right = x @ gate, x @ up
    if activation == "situ":
        return (4 * np.tanh(left / 4) * sigmoid(left) * (25 * np.tanh(right / 25))) @ down
    return (left * sigmoid(left) * right) @ down


def by_hand(layer, h, options):
    """A token at a time; returns the chosen experts too."""
    activation = options.get("activation", "silu")
    chosen_experts = []
    kernels = [f64(linear.kernel) for linear in (layer.gate, layer.up, layer.down)]

    def token(h):
        x = rms_norm(h, layer.norm)
        logits = x @ f64(layer.router.kernel)
        scores = sigmoid(logits)
        if options.get("router_activation") == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum()
        corrected = scores + f64(layer.correction_bias)
        groups = corrected.reshape(options.get("num_groups", 1), -1)
        best_groups = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: options.get("top_groups", 1)]
        allowed = [e for e in range(8) if e // groups.shape[1] in best_groups]
        chosen = sorted(allowed, key=lambda e: -corrected[e])[:2]
        chosen_experts.append(chosen)
        weights = (corrected if options.get("biased_weights") else scores)[chosen]
        weights = weights / weights.sum() * options.get("scaling", 1.0)
        z = x if layer.latent_down is None else x @ f64(layer.latent_down.kernel)
        y = sum(w * gated(z, *(k[e] for k in kernels), activation) for e, w in zip(chosen, weights, strict=True))
        if layer.latent_up is not None:
            y = (y if layer.latent_norm is None else rms_norm(y, layer.latent_norm)) @ f64(layer.latent_up.kernel)
        if layer.shared is not None:
            shared = [f64(linear.kernel) for linear in (layer.shared.gate, layer.shared.up, layer.shared.down)]
            y = y + gated(x, *shared, activation)
        return y

    y = np.apply_along_axis(token, -1, np.asarray(h, np.float64))
    return y, np.array(chosen_experts)


@pytest.mark.parametrize("implementation", ["ragged", "sorted", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer(kind, implementation):
    layer, h = make(kind, implementation=implementation), 3 * jax.random.normal(jax.random.key(1), (2, 9, 10))
    y, found = run(layer, h, None)
    expected, chosen = by_hand(layer, h, KINDS[kind])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.load, np.bincount(chosen.ravel(), minlength=8) / chosen.size, rtol=1e-6)


def test_shared_experts_are_one_wide_mlp():
    assert make("kimi k3").shared.gate.kernel.shape == (10, 14)
    assert make("k3 without norm").shared.gate.kernel.shape == (10, 3)
    assert make("qwen3").shared is None


def test_padding_is_left_out_of_the_report_alone():
    layer, h = make("kimi linear"), jax.random.normal(jax.random.key(1), (2, 9, 10))
    segment_ids = jnp.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])
    context = make_context(segment_ids, segment_ids, None, 4, 100.0)
    y, found = run(layer, h, context)
    bare, _ = run(layer, h, None)
    _, chosen = by_hand(layer, h, KINDS["kimi linear"])
    kept = chosen.reshape(2, 9, 2)[np.asarray(segment_ids) > 0]
    np.testing.assert_allclose(found.load, np.bincount(kept.ravel(), minlength=8) / kept.size, rtol=1e-6)
    assert float(found.tokens) == 16
    np.testing.assert_array_equal(y, bare)


def test_gradients_by_every_implementation():
    """Losses of the report included; the correction bias has none."""
    h = jax.random.normal(jax.random.key(1), (2, 9, 10))

    def value(layer, h):
        y, found = layer(h, None)
        return jnp.sum(jnp.sin(y)) + found.balance_loss + found.z_loss

    gradients = jax.jit(jax.grad(value, argnums=(0, 1)))
    bars = {name: gradients(make("kimi k3", implementation=name), h) for name in ("dense", "sorted", "ragged")}
    for name in ("sorted", "ragged"):
        for found, expected in zip(*(jax.tree.leaves(bars[each]) for each in (name, "dense")), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    layer_bar, _ = bars["sorted"]
    assert not np.any(layer_bar.correction_bias[...])
    assert np.any(layer_bar.router.kernel[...])


def test_a_stack_scans_under_remat_and_equals_a_loop():
    stack = jax.vmap(lambda key: MoE(10, 8, 2, 7, num_shared=1, eps=EPS, dtype="float32", rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    assert stack.gate.kernel.shape == (3, 8, 10, 7) and stack.correction_bias.shape == (3, 8)
    h = jax.random.normal(jax.random.key(1), (2, 9, 10))

    def scanned(stack):
        block = jax.checkpoint(lambda h, layer: layer(h, None))

        def step(h, layer):
            y, found = block(h, layer)
            return h + y, found

        h_last, reports = jax.lax.scan(step, h, stack)
        return jnp.sum(h_last**2) + reports.balance_loss.sum(), reports

    def looped(stack):
        x, total = h, 0.0
        for i in range(3):
            y, found = jax.tree.map(lambda leaf, i=i: leaf[i], stack)(x, None)
            x, total = x + y, total + found.balance_loss
        return jnp.sum(x**2) + total

    (value, reports), found = jax.jit(jax.value_and_grad(scanned, has_aux=True))(stack)
    wanted, expected = jax.jit(jax.value_and_grad(looped))(stack)
    assert reports.load.shape == (3, 8)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for found_bar, expected_bar in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found_bar, expected_bar, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sorted", "ragged", "dense"])
def test_half_precision(implementation):
    layer = make("kimi k3", dtype="bfloat16", implementation=implementation)
    h = jax.random.normal(jax.random.key(1), (2, 9, 10), jnp.bfloat16)
    y, found = run(layer, h, None)
    assert y.dtype == jnp.bfloat16 and all(value.dtype == jnp.float32 for value in found)
    expected, _ = by_hand(layer, h, KINDS["kimi k3"])
    # Experts are chosen from rounded inputs: of a token near a tie, another one may be.
    error = np.linalg.norm(np.asarray(y, np.float64) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) < 0.02
    bars = jax.jit(jax.grad(lambda layer: jnp.sum(layer(h, None)[0].astype(jnp.float32))))(layer)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(bars))
