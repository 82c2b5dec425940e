"""Experts in training: the routers' losses, accumulation, and score corrections that follow the load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numerics import worst

from attnres_jax.config import DepthConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from attnres_jax.models import Decoder
from attnres_jax.training import TrainState, make_optimizer, make_train_step
from attnres_jax.training.loss import objective

MODEL = ModelConfig(
    mlp_layers="swiglu,moe*",
    vocab_size=31,
    width=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=16,
    max_length=8,
    moe=MoEConfig(num_experts=4, expert_width=8, experts_per_token=1),
    depth=DepthConfig(rule="block", block_size=2),
)
TOKEN_BYTES = jnp.ones(31)


@pytest.fixture(scope="module")
def batch():
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 0, 31)
    segment_ids = jnp.ones((4, 8), jnp.int32).at[:, 6:].set(0)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": jnp.tile(jnp.arange(8), (4, 1)),
        "weights": (segment_ids > 0).astype(jnp.float32),
    }


def run(batch, steps=1, optimizer=None, start=0, **settings):
    settings = {"steps": 100, "router_bias_rate": 0.01, "router_bias_until": 1.0} | settings
    optimizer = optimizer or make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-3))
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    state = TrainState(jnp.asarray(start, jnp.int32), model, optimizer.init(model), jax.random.key(0))
    step = make_train_step(TrainingConfig(**settings), optimizer, optax.constant_schedule(1e-3))
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch, TOKEN_BYTES)
        history.append(jax.tree.map(float, metrics))
    return state.model, history


def test_corrections_follow_the_load_and_nothing_else_moves_them(batch):
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    _, reports = model.with_reports(batch["inputs"], batch["segment_ids"], batch["positions"])
    after, (metrics,) = run(batch)
    signs = np.sign(0.25 - np.asarray(reports.load))
    expected = 0.01 * (signs - signs.mean(1, keepdims=True))
    np.testing.assert_allclose(after.sublayers["moe"].correction_bias[...], expected, atol=1e-7)
    assert metrics["router/max_violation"] == pytest.approx(float(reports.max_violation.mean()), rel=1e-5)
    assert metrics["router/balance_loss"] == pytest.approx(float(reports.balance_loss.mean()), rel=1e-5)
    assert metrics["router/idle"] == float(reports.idle.mean())
    assert metrics["router/dropped"] == metrics["router/device_violation"] == 0
    assert metrics["grad_norm/router"] > 0 and metrics["grad_norm/experts"] > 0


def test_the_load_evens_out(batch):
    """With the routers at rest, the corrections alone spread the tokens."""
    _, history = run(batch, 60, optax.sgd(0.0))
    assert history[-1]["router/max_violation"] < 0.5 * history[0]["router/max_violation"]


@pytest.mark.parametrize(("start", "moves"), [(0, True), (74, True), (75, False)])
def test_corrections_rest_in_the_decay_phase(batch, start, moves):
    model, _ = run(batch, start=start, router_bias_until=0.75)  # of a hundred steps
    assert bool(jnp.any(model.sublayers["moe"].correction_bias[...])) == moves


def test_accumulation_changes_nothing(batch):
    (whole, (one,)), (parts, (two,)) = (run(batch, optimizer=optax.sgd(0.1), accumulation=n) for n in (1, 2))
    assert worst(parts, whole) < 1e-5
    assert two == pytest.approx(one, rel=1e-4)


def test_router_losses_are_part_of_the_objective(batch):
    """At their weights, as means over the layers; a batch that is half of a step's tokens has half of each.

    They are no part of the sum that is reported as the loss.
    """
    config = TrainingConfig(z_loss=0.2, router_balance_loss=0.3, router_z_loss=0.7)
    total = 2 * jnp.sum(batch["weights"])

    def by_hand(model):
        logits, reports = model.with_reports(batch["inputs"], batch["segment_ids"], batch["positions"])
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        sums = jnp.sum(batch["weights"] * jnp.stack([nll, log_z**2]), (1, 2))
        (balance, other_balance), (z, other_z) = reports.balance_loss, reports.z_loss  # two layers have experts
        routers = 0.3 * (balance + other_balance) / 2 + 0.7 * (z + other_z) / 2
        return (sums[0] + 0.2 * sums[1]) / total + routers / 2, sums[0]

    def share(model):
        value, sums = objective(model, batch, TOKEN_BYTES, total, config)
        return value, sums["nll"]

    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    found, expected = jax.jit(lambda m: [jax.value_and_grad(f, has_aux=True)(m) for f in (share, by_hand)])(model)
    assert worst(found, expected) < 1e-5


def test_dense_models_have_no_router_metrics(batch):
    dense = dataclasses.replace(MODEL, mlp_layers="swiglu")
    optimizer = optax.sgd(0.1)
    model = Decoder(dense, rngs=nnx.Rngs(0))
    state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jax.random.key(0))
    step = make_train_step(TrainingConfig(), optimizer, optax.constant_schedule(0.1))
    assert not any("router" in key for key in step(state, batch, TOKEN_BYTES)[1])
