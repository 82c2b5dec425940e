"""Depth diagnostics against NumPy on the plain pass, when they are made, and their rows in a run."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, MetricsConfig, ModelConfig
from attnres_jax.depth import RULES
from attnres_jax.models import Decoder, unrolled
from attnres_jax.training import train
from attnres_jax.training.diagnostics import DepthDiagnostics, depth_diagnostics
from attnres_jax.training.parameters import named_leaves
from attnres_jax.training.records import read_rows

T = 6


def small_model(rule):
    depth = DepthConfig(rule=rule, block_size=2)
    shape = {"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 12}
    return jax.jit(lambda: Decoder(ModelConfig(**shape, depth=depth), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def batch():
    """Two rows; the last two tokens of each are padding."""
    tokens = np.random.default_rng(0).integers(0, 11, (2, T + 1)).astype(np.int32)
    real = np.broadcast_to(np.arange(T) < T - 2, (2, T))
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    rest = {"segment_ids": real.astype(np.int32), "positions": positions, "weights": real.astype(np.float32)}
    return jax.tree.map(jnp.asarray, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]} | rest)


@pytest.mark.parametrize("rule", RULES)
def test_values_are_those_of_the_plain_pass(rule, batch):
    model = small_model(rule)
    model.sites = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape), model.sites)
    metrics = jax.jit(depth_diagnostics)(model, batch)

    def loss(probes):
        trace = unrolled(model, batch["inputs"], batch["segment_ids"], batch["positions"], probes=probes)
        log_p = jax.nn.log_softmax(trace.logits)
        picked = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return -(picked * batch["weights"]).sum(), trace

    gradients, trace = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((4, 2, T, 8)))
    real = np.asarray(batch["segment_ids"]) > 0
    for key, array in (("output_rms", trace.outputs), ("output_grad_rms", gradients)):
        expected = np.sqrt((np.asarray(array, np.float64)[:, real] ** 2).mean((1, 2)))
        np.testing.assert_allclose(metrics[key], expected, rtol=2e-5, err_msg=key)
    if trace.weights is None:
        assert set(metrics) == {"output_rms", "output_grad_rms", "depth/spike"}
        assert rule not in ("block", "full", "rms_block", "delta", "delta_block", "denseformer", "muddformer")
        return
    signed = any((np.asarray(weights) < 0).any() for weights in trace.weights)
    assert signed == (rule in ("denseformer", "muddformer"))
    for site, weights in enumerate(trace.weights):
        w = np.abs(np.asarray(weights, np.float64)[:, real])
        w /= w.sum(0)
        np.testing.assert_allclose(metrics["depth_entropy"][site], -(w * np.log(w)).sum(0).mean(), atol=1e-5)
        np.testing.assert_allclose(metrics["depth_max_weight"][site], w.max(0).mean(), rtol=1e-5)


def test_a_spike_is_the_first_output_far_above_the_others(batch):
    model, diagnostics = small_model("block"), jax.jit(depth_diagnostics)
    assert diagnostics(model, batch)["depth/spike"] == 0
    kernel = named_leaves(model)["sublayers.gqa.out.kernel"]
    model.sublayers["gqa"].out.kernel[...] = kernel.at[0].multiply(1e4)
    assert diagnostics(model, batch)["depth/spike"] == 1


def test_only_the_first_row_is_measured_and_compiled_once(batch):
    model, pauses = small_model("block"), []

    def paused():
        pauses.append(1)
        return contextlib.nullcontext()

    diagnostics = DepthDiagnostics(MetricsConfig(depth=True, every=3))
    assert [step for step in range(1, 10) if diagnostics.is_due(step)] == [3, 6, 9]
    assert not any(DepthDiagnostics(MetricsConfig(every=3)).is_due(step) for step in range(1, 10))
    first = jax.jit(depth_diagnostics)(model, {key: value[:1] for key, value in batch.items()})
    for _ in range(2):
        for key, value in diagnostics.measure(model, batch, paused).items():
            np.testing.assert_allclose(value, first[key], rtol=1e-4, atol=1e-6)
    assert len(pauses) == 1


def test_a_run_writes_them_and_trains_the_same(finished_run, config, tmp_path):
    metrics = MetricsConfig(depth=True, every=5)
    training = dataclasses.replace(config.training, steps=10, log_every=4)
    short = dataclasses.replace(config, training=training)
    losses = []
    for name, each in (("off", short), ("on", dataclasses.replace(short, metrics=metrics))):
        train(each, tmp_path / name)
        rows = [row for row in read_rows(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        losses.append({row["step"]: row["loss"] for row in rows})
        measured = [row["step"] for row in rows if "depth/spike" in row]
        assert measured == ([5, 10] if name == "on" else [])
    assert set(losses[1]) == {1, 4, 5, 8, 10}
    assert {step: losses[1][step] for step in losses[0]} == losses[0]
    row = rows[-1]
    assert {f"output_rms/{i:02d}" for i in range(4)} | {f"depth_entropy/{i:02d}" for i in range(5)} <= set(row)
    json.dumps(row, allow_nan=False)
