"""AdamW, its schedule, what decays and what is clipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, ModelConfig, OptimizerConfig
from attnres_jax.models import Decoder
from attnres_jax.training import learning_rate_schedule, make_optimizer
from attnres_jax.training.parameters import named_leaves

MODEL = ModelConfig(
    vocab_size=11,
    width=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=12,
    tie_embeddings=False,
    depth=DepthConfig(rule="full"),
)
DECAYING = {
    "embedding.table",
    "head.table",
    "sublayers.gqa.query.kernel",
    "sublayers.gqa.key.kernel",
    "sublayers.gqa.value.kernel",
    "sublayers.gqa.out.kernel",
    "sublayers.swiglu.gate.kernel",
    "sublayers.swiglu.up.kernel",
    "sublayers.swiglu.down.kernel",
}


@pytest.fixture(scope="module")
def model():
    """Every parameter is one half, so that decay shows on all."""
    shapes = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)


def updates_of(config, gradients, params):
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    return jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)[0])(
        gradients, params
    )


@pytest.mark.parametrize(("warmup", "steps"), [(4, 20), (0, 7), (6, 7)])
def test_schedule_rises_in_equal_parts_to_the_peak_and_ends_at_the_final_rate(warmup, steps):
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=warmup)
    rates = np.array([learning_rate_schedule(config, steps)(step) for step in range(steps)])
    decay = (np.arange(warmup, steps) - warmup) / max(steps - 1 - warmup, 1)
    expected = np.concatenate([(np.arange(warmup) + 1) / (warmup + 1), 0.1 + 0.9 * (1 + np.cos(np.pi * decay)) / 2])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_only_matrices_decay(model):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2)
    updates = named_leaves(updates_of(config, jax.tree.map(jnp.zeros_like, model), model))
    assert {name for name, update in updates.items() if np.any(update)} == DECAYING
    for name in DECAYING:
        np.testing.assert_allclose(updates[name], -0.1 * 0.2 * 0.5, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a.kernel": jnp.zeros(2), "b.scale": jnp.zeros(1)}
    # With eps far above the gradients the first Adam update is learning_rate * gradient / eps: it shows the scale.
    config = OptimizerConfig(learning_rate=1.0, eps=1e6, clip_norm=1.0, weight_decay=0.0)
    gradients = {"a.kernel": jnp.array([3.0, 0.0]), "b.scale": jnp.array([4.0])}
    large = updates_of(config, gradients, params)
    np.testing.assert_allclose(large["a.kernel"] * 1e6, [-0.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(large["b.scale"] * 1e6, [-0.8], rtol=1e-5)
    small = updates_of(config, jax.tree.map(lambda leaf: leaf / 10, gradients), params)
    np.testing.assert_allclose(small["b.scale"] * 1e6, [-0.4], rtol=1e-5)


def test_updates_are_adamw():
    """Two steps against the equations of Loshchilov and Hutter (2019), in float64."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, clip_norm=1e9, beta1=0.7, beta2=0.8, eps=0.3)
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)}
    state = optimizer.init(params)
    w = np.asarray(params["kernel"], np.float64)
    m = v = np.zeros_like(w)
    for step in (1, 2):
        gradients = {"kernel": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)}
        g = np.asarray(gradients["kernel"], np.float64)
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
        w = w - 0.01 * ((m / (1 - 0.7**step)) / (np.sqrt(v / (1 - 0.8**step)) + 0.3) + 0.1 * w)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


def test_depth_parameters_have_a_decay_and_learning_rates_of_their_own(model):
    plain = OptimizerConfig(learning_rate=0.1, weight_decay=0.2)
    own = dataclasses.replace(
        plain,
        depth_weight_decay=0.3,
        depth_query_lr_multiplier=0.5,
        depth_key_scale_decay_multiplier=2.0,
        depth_key_scale_lr_multiplier=0.25,
    )
    gradients = jax.tree.map(jnp.ones_like, model)
    base, changed = (named_leaves(updates_of(config, gradients, model)) for config in (plain, own))
    # Adam's first update is -learning_rate * sign, decay of a half beside it, the multiplier on both.
    np.testing.assert_allclose(changed["sites.query"], 0.5 * (base["sites.query"] - 0.1 * 0.3 * 0.5), rtol=1e-6)
    expected = 0.25 * (base["sites.key_scale"] - 0.1 * 0.6 * 0.5)
    np.testing.assert_allclose(changed["sites.key_scale"], expected, rtol=1e-6)
    still = dataclasses.replace(own, depth_key_scale_lr_multiplier=0.0, depth_query_decay_multiplier=0.0)
    updates = named_leaves(updates_of(still, gradients, model))
    assert not np.any(updates["sites.key_scale"])
    np.testing.assert_allclose(updates["sites.query"], 0.5 * base["sites.query"], rtol=1e-6)
    for name in base.keys() - {"sites.query", "sites.key_scale"}:
        np.testing.assert_array_equal(changed[name], base[name])


def test_groups_keep_no_state(model):
    """Paths of the saved state are those of optax.adamw, so that older checkpoints are read."""
    old = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.1))
    new = make_optimizer(OptimizerConfig(depth_query_lr_multiplier=2.0), lambda _: 0.1)
    assert set(named_leaves(new.init(model))) == set(named_leaves(old.init(model)))
