"""The step: its loss, exact accumulation, metrics and update."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numerics import worst

from attnres_jax.config import TrainingConfig
from attnres_jax.training import TrainState, make_train_step
from attnres_jax.training.loss import objective
from attnres_jax.training.step import accumulate

V, B, T = 13, 8, 6


class Bigram(nnx.Module):
    """Enough of a language model: logits from the token and its position."""

    def __init__(self, scale=1.0):
        self.embedding = nnx.Dict({"table": nnx.Param(scale * jax.random.normal(jax.random.key(0), (V, V)))})
        self.head = nnx.Dict({"kernel": nnx.Param(jax.random.normal(jax.random.key(1), (V, V)))})

    def with_reports(self, tokens, segment_ids, positions):
        h = self.embedding["table"][...][tokens] + positions[..., None] / T
        return jnp.tanh(h) @ self.head["kernel"][...], None


@pytest.fixture(scope="module")
def batch():
    """Weights that fall on the rows as unevenly as can be: some micro-batches weigh next to nothing."""
    draw = np.random.default_rng(0)
    weights = (draw.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32)
    integers = {key: draw.integers(0, V, (B, T)).astype(np.int32) for key in ("inputs", "targets")}
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    rest = {"segment_ids": np.ones((B, T), np.int32), "positions": positions, "weights": weights}
    return jax.tree.map(jnp.asarray, integers | rest)


TOKEN_BYTES = jnp.arange(V)


def state_of(model, optimizer):
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), jax.random.key(0))


def run_step(batch, model=None, optimizer=None, **settings):
    optimizer = optimizer or optax.sgd(0.1)
    step = make_train_step(TrainingConfig(**settings), optimizer, optax.constant_schedule(0.1))
    return step(state_of(model or Bigram(), optimizer), batch, TOKEN_BYTES)


def float64_loss(batch, z_loss=0.0):
    model = Bigram()
    table = np.asarray(model.embedding["table"][...], np.float64)
    logits = np.tanh(table[batch["inputs"]] + batch["positions"][..., None] / T)
    logits = logits @ np.asarray(model.head["kernel"][...], np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"], np.float64)
    return (weights * (nll + z_loss * log_z**2)).sum() / weights.sum(), (weights * nll).sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_objective_is_weighted_cross_entropy_plus_z_loss(batch, z_loss):
    value, _ = objective(Bigram(), batch, TOKEN_BYTES, jnp.sum(batch["weights"]), TrainingConfig(z_loss=z_loss))
    np.testing.assert_allclose(value, float64_loss(batch, z_loss)[0], rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulated_gradient_is_that_of_the_whole_batch(batch, micro_batches):
    total = jnp.sum(batch["weights"])
    config = TrainingConfig(z_loss=0.01, accumulation=micro_batches)
    whole, whole_sums = jax.grad(objective, has_aux=True)(Bigram(), batch, TOKEN_BYTES, total, config)
    parts, sums = accumulate(Bigram(), batch, TOKEN_BYTES, total, config)
    assert worst(parts, whole) < 1e-6
    assert worst(sums, whole_sums) < 1e-6


def test_accumulation_changes_neither_the_update_nor_the_metrics(batch):
    whole, parts = run_step(batch), run_step(batch, accumulation=4)
    assert worst(parts[0].model, whole[0].model) < 1e-6
    assert parts[1].pop("finite") and whole[1].pop("finite")
    assert worst(parts[1], whole[1]) < 1e-6


def test_metrics_are_those_of_the_step(batch):
    before = jax.tree.map(np.array, Bigram())
    state, metrics = run_step(batch, z_loss=0.01)
    loss, nll = float64_loss(batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    text_bytes = (TOKEN_BYTES[batch["targets"]] * batch["weights"]).sum()
    np.testing.assert_allclose(metrics["bits_per_byte"], nll / math.log(2) / text_bytes, rtol=1e-6)
    np.testing.assert_allclose(metrics["z_loss"], float64_loss(batch, 0.01)[0] - loss, rtol=1e-4)
    update = np.linalg.norm(np.array(state.model.head["kernel"][...]) - before.head["kernel"][...])
    np.testing.assert_allclose(metrics["update_norm/head"], update, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm/head"], update / 0.1, rtol=1e-5)
    both = np.hypot(metrics["grad_norm/head"], metrics["grad_norm/embedding"])
    np.testing.assert_allclose(metrics["grad_norm"], both, rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm/head"], np.linalg.norm(state.model.head["kernel"][...]), rtol=1e-5)
    assert bool(metrics["finite"])
    assert int(state.step) == 1


def test_state_is_donated(batch):
    optimizer = optax.sgd(0.1)
    state = state_of(Bigram(), optimizer)
    make_train_step(TrainingConfig(), optimizer, optax.constant_schedule(0.1))(state, batch, TOKEN_BYTES)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.model))


def test_an_update_that_overflows_is_not_finite_though_the_loss_is(batch):
    _, metrics = run_step(batch, optimizer=optax.sgd(1e38))
    assert np.isfinite(metrics["loss"])
    assert not metrics["finite"]


def test_a_batch_without_weights_changes_nothing(batch):
    empty = batch | {"weights": jnp.zeros((B, T))}
    state, metrics = run_step(empty)
    assert worst(state.model, Bigram()) == 0
    assert float(metrics["loss"]) == 0
    assert bool(metrics["finite"])


def test_half_precision_logits_are_summed_in_float32(batch):
    """A bfloat16 log-softmax over many tokens would be off in the third digit."""

    class Half(Bigram):
        def with_reports(self, *args):
            return super().with_reports(*args)[0].astype(jnp.bfloat16), None

    value, _ = objective(Half(), batch, TOKEN_BYTES, jnp.sum(batch["weights"]), TrainingConfig())
    rounded = np.asarray(
        Half().with_reports(batch["inputs"], None, batch["positions"])[0].astype(jnp.float32), np.float64
    )
    nll = np.log(np.exp(rounded).sum(-1)) - np.take_along_axis(rounded, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(value, (nll * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-6)
    assert value.dtype == jnp.float32


def test_state_is_a_pytree_of_its_fields():
    state = TrainState(1, {"a": 2}, (3,), 4)
    assert jax.tree.leaves(state) == [1, 2, 3, 4]
    assert dataclasses.replace(state, step=5).step == 5
