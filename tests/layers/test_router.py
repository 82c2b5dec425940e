"""Routing, losses and the bias update against plain float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import HIGHEST, precisions

from attnres_jax.layers.router import (
    max_violation,
    report,
    route,
    router_logits,
    router_z_loss,
    sequence_balance_loss,
    update_bias,
)


def logits_and_bias(num_experts=8, shape=(2, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, num_experts)), 0.3 * rng.normal(size=num_experts)


def route_by_hand(logits, bias, k, *, activation, renormalise=True, scaling=1.0, groups=1, top=1, biased_weights=False):
    """One token."""
    scores = 1 / (1 + np.exp(-logits)) if activation == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    corrected = scores + bias
    members = np.arange(len(logits)).reshape(groups, -1)
    strength = [np.sort(corrected[group])[-2:].sum() for group in members]
    allowed = [e for g in sorted(range(groups), key=lambda g: -strength[g])[:top] for e in members[g]]
    chosen = sorted(allowed, key=lambda e: -corrected[e])[:k]
    weights = (corrected if biased_weights else scores)[chosen]
    return chosen, scaling * (weights / weights.sum() if renormalise else weights)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "sigmoid", "scaling": 2.446},
        {"activation": "sigmoid", "scaling": 2.446, "biased_weights": True},
        {"activation": "sigmoid", "renormalise": False},
        {"activation": "softmax"},
        {"activation": "softmax", "renormalise": False, "scaling": 16.0},
        {"activation": "sigmoid", "groups": 4, "top": 2},
        {"activation": "sigmoid", "groups": 8, "top": 3},
        {"activation": "softmax", "groups": 2, "top": 1, "biased_weights": True},
    ],
)
def test_choice_and_weights(options):
    logits, bias = logits_and_bias()
    renamed = {"groups": "num_groups", "top": "top_groups"}
    routing = route(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        3,
        **{renamed.get(key, key): value for key, value in options.items()},
    )
    for at in np.ndindex(logits.shape[:2]):
        chosen, weights = route_by_hand(logits[at], bias, 3, **options)
        assert routing.indices[at].tolist() == chosen
        np.testing.assert_allclose(routing.weights[at], weights, rtol=1e-5)


def test_groups_limit_the_choice_even_if_all_scores_are_negative():
    """With the others at zero, as some implementations have them, they would win here."""
    logits, bias = jnp.array([0.0, 0.1, 5.0, -5.0]), jnp.full(4, -3.0)
    assert route(logits, bias, 2, num_groups=2, top_groups=1).indices.tolist() == [1, 0]


def test_impossible_groups_are_refused():
    logits, bias = map(jnp.asarray, logits_and_bias())
    for groups, top in ((3, 1), (4, 5), (4, 1)):
        with pytest.raises(ValueError, match=f"within {top} of {groups} groups"):
            route(logits, bias, 3, num_groups=groups, top_groups=top)


def test_logits_are_float32_of_any_input():
    x, kernel = jax.random.normal(jax.random.key(0), (7, 16)), jax.random.normal(jax.random.key(1), (16, 4))
    logits = router_logits(x.astype(jnp.bfloat16), kernel)
    assert logits.dtype == jnp.float32
    expected = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda *given: router_logits(*given).sum(), argnums=(0, 1))
    assert precisions(jax.make_jaxpr(gradient)(x.astype(jnp.bfloat16), kernel)) == {HIGHEST}


@pytest.mark.parametrize("biased_weights", [False, True])
def test_no_gradient_reaches_the_bias_and_one_reaches_the_logits(biased_weights):
    logits, bias = map(jnp.asarray, logits_and_bias())
    value = lambda *given: jnp.sum(route(*given, 3, biased_weights=biased_weights).weights ** 2)  # noqa: E731
    logits_bar, bias_bar = jax.grad(value, argnums=(0, 1))(logits, bias)
    assert not np.any(bias_bar) and np.any(logits_bar)


def losses_by_hand(logits, k, valid):
    scores, balance, squares = 1 / (1 + np.exp(-logits)), [], []
    num_experts = logits.shape[-1]
    for b in range(len(logits)):
        tokens = [t for t in range(logits.shape[1]) if valid[b, t]]
        squares += [np.log(np.exp(logits[b, t]).sum()) ** 2 for t in tokens]
        if not tokens:
            continue
        loss = 0.0
        for e in range(num_experts):
            hits = sum(e in np.argsort(-scores[b, t])[:k] for t in tokens)
            share = np.mean([scores[b, t, e] / scores[b, t].sum() for t in tokens])
            loss += num_experts / (k * len(tokens)) * hits * share
        balance.append(loss)
    return np.mean(balance), np.mean(squares)


def test_scores_that_all_underflow_are_balanced_too():
    def loss(logits):
        routing = route(logits, jnp.zeros(4), 2)
        return sequence_balance_loss(routing.scores, routing.indices) + jnp.sum(routing.weights[..., 0])

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 3, 4), -120.0).at[0, 0].set(jnp.arange(4.0)))
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient[0, 0]).max() > 0


@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_load(padded):
    logits, _ = logits_and_bias(shape=(3, 5))
    valid = np.ones((3, 5), bool)
    if padded:
        valid[0, 3:] = valid[2] = False  # a row with padding, and one of nothing else
    routing = route(jnp.asarray(logits, jnp.float32), jnp.zeros(8), 2)
    found = report(routing, jnp.asarray(valid) if padded else None)
    balance, squares = losses_by_hand(logits, 2, valid)
    np.testing.assert_allclose(found.balance_loss, balance, rtol=1e-5)
    np.testing.assert_allclose(found.z_loss, squares, rtol=1e-5)
    counts = np.bincount(np.argsort(-logits, axis=-1)[valid][:, :2].ravel(), minlength=8)
    np.testing.assert_allclose(found.load, counts / counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(found.max_violation, counts.max() / counts.mean() - 1, rtol=1e-5)
    assert float(found.tokens) == valid.sum() and float(found.idle) == (counts == 0).mean()


def test_padding_has_no_gradient():
    logits, _ = logits_and_bias()
    valid = jnp.arange(5)[None] < jnp.array([[3], [5]])
    routing = route(jnp.asarray(logits), jnp.zeros(8), 2)
    for value in (
        lambda logits: router_z_loss(logits, valid),
        lambda logits: sequence_balance_loss(jax.nn.sigmoid(logits), routing.indices, valid),
    ):
        bars = np.abs(jax.grad(value)(jnp.asarray(logits))).sum(-1)
        assert np.array_equal(bars > 0, valid)


def test_nothing_but_padding_is_finite():
    logits, bias = map(jnp.asarray, logits_and_bias())
    found = report(route(logits, bias, 2), jnp.zeros((2, 5), bool))
    assert all(np.all(np.isfinite(value)) for value in found)


def test_bias_moves_by_the_centred_sign_and_keeps_its_mean():
    load = np.array([[0.5, 0.1, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    signs = np.sign(load.mean(-1, keepdims=True) - load)
    expected = 0.01 * (signs - signs.mean(-1, keepdims=True))
    found = update_bias(jnp.zeros((2, 4)), jnp.asarray(load, jnp.float32), 0.01)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    bias = jnp.zeros(4)
    for step in range(200):
        bias = update_bias(bias, jax.random.uniform(jax.random.key(step), (4,)), 0.01)
    assert abs(float(bias.mean())) < 1e-7 < float(jnp.abs(bias).max())
    assert np.array_equal(update_bias(bias, jnp.asarray(load[0]), 0.0), bias)  # the decay phase


@pytest.mark.parametrize("activation, rate", [("sigmoid", 0.003), ("softmax", 0.0005)])
def test_updates_balance_a_skewed_router(activation, rate):
    """Scores of a softmax over 16 experts are smaller, and so must the steps be."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 64, 16)) + np.linspace(-1.5, 1.5, 16), jnp.float32)

    @jax.jit
    def step(bias, _):
        load = report(route(logits, bias, 2, activation=activation)).load
        return update_bias(bias, load, rate), max_violation(load)

    bias, violations = jax.lax.scan(step, jnp.zeros(16), length=400)
    assert violations[0] > 1.5 and jnp.mean(violations[-50:]) < 0.15
    assert abs(float(bias.mean())) < 1e-6
