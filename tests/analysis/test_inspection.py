import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax import build_model
from attnres_jax.analysis import depth_weights, inspect_model, inspect_run, magnitudes, read_run
from attnres_jax.analysis.inspection import MAGNITUDES
from attnres_jax.config import DepthConfig, ModelConfig
from attnres_jax.models import unrolled

RULES = [("residual", 2), ("block", 4), ("block", 2), ("full", 2)]


def make(rule, block_size, *, learned=True):
    """Three layers, so that blocks of four sublayers leave a short last one."""
    depth = DepthConfig(rule=rule, block_size=block_size)
    config = ModelConfig(
        vocab_size=30, width=8, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=12, max_length=16, depth=depth
    )
    model = build_model(config, rngs=nnx.Rngs(0))
    if learned and rule != "residual":
        model.sites.query.set_value(jax.random.normal(jax.random.key(1), model.sites.query.shape))
    return model


@pytest.fixture(scope="module")
def batch():
    """Two rows, the first of two documents, the second with padding."""
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4], np.int32)
    positions = np.array([[*range(5), *range(7)], [*range(8), 0, 0, 0, 0]], np.int32)
    tokens = rng.integers(0, 30, (2, 2, 12)).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    return {
        "inputs": tokens[0],
        "targets": tokens[1],
        "segment_ids": segments,
        "positions": positions,
        "weights": weights,
    }


@pytest.mark.parametrize(("rule", "block_size"), RULES)
def test_agrees_with_the_whole_batch_at_once(rule, block_size, batch):
    model = make(rule, block_size)
    arguments = [jnp.asarray(batch[key]) for key in ("inputs", "segment_ids", "positions")]

    def loss(probes):
        log_p = jax.nn.log_softmax(unrolled(model, *arguments, probes=probes).logits)
        picked = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["weights"])

    trace = unrolled(model, *arguments)
    arrays = (trace.outputs, trace.states, jax.grad(loss)(jnp.zeros((6, 2, 12, 8))), trace.inputs)
    real = batch["segment_ids"] > 0
    inspection = inspect_model(model, batch)
    for key, array in zip(MAGNITUDES, arrays, strict=True):
        expected = [np.sqrt(np.mean(np.square(np.asarray(one)[real]))) for one in array]
        np.testing.assert_allclose(getattr(inspection, key), expected, rtol=2e-5, err_msg=key)
        np.testing.assert_array_equal(magnitudes(model, batch)[key], getattr(inspection, key))
    if rule == "residual":
        assert inspection.depth_weights is None and depth_weights(model, batch) is None
        return
    for row, weights in zip(inspection.depth_weights, trace.weights, strict=True):
        expected = np.asarray(weights)[:, real].mean(1)
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-5)
        assert np.isnan(row[len(expected) :]).all()
    np.testing.assert_allclose(np.nansum(inspection.depth_weights, axis=1), 1, rtol=1e-6)


def test_what_stands_in_padding_changes_nothing(batch):
    model = make("block", 4)
    other = {key: value.copy() for key, value in batch.items()}
    other["inputs"][1, 8:] = 7
    other["targets"][1, 8:] = 3
    padding = {key: np.concatenate([value, np.zeros_like(value[:1])]) for key, value in other.items()}
    one, two = inspect_model(model, batch), inspect_model(model, padding)
    for key in (*MAGNITUDES, "depth_weights"):
        np.testing.assert_array_equal(getattr(one, key), getattr(two, key))


@pytest.mark.parametrize(("rule", "block_size"), RULES[1:])
def test_an_untrained_model_reads_evenly(rule, block_size, batch):
    weights = depth_weights(make(rule, block_size, learned=False), batch)
    counts = np.isfinite(weights).sum(1, keepdims=True)
    np.testing.assert_allclose(np.where(np.isfinite(weights), weights * counts, 1), 1, rtol=1e-6)


def test_labels_name_what_the_rule_reads(batch):
    sublayers = ["attention 1", "MLP 1", "attention 2", "MLP 2", "attention 3", "MLP 3"]
    labels = {}
    for rule, block_size in RULES:
        inspection = inspect_model(make(rule, block_size), batch)
        assert inspection.site_labels == (*sublayers, "readout")
        labels[rule, block_size] = inspection.source_labels
    assert labels["residual", 2] == ()
    assert labels["block", 4] == ("embedding", "block 1", "block 2")
    assert labels["block", 2] == ("embedding", "block 1", "block 2", "block 3")
    assert labels["full", 2] == ("embedding", *sublayers)


def test_run_is_inspected_into_its_workdir(real_run):
    before = read_run(real_run).inspection
    inspection = inspect_run(real_run)
    for key in MAGNITUDES:
        np.testing.assert_array_equal(before[key], getattr(inspection, key))
    np.testing.assert_array_equal(before["depth_weights"], inspection.depth_weights)
    assert list(before["source_labels"]) == ["embedding", "block 1", "block 2"] == list(inspection.source_labels)
    assert before["depth_weights"].shape == (5, 3)
    assert not list(real_run.glob(".inspection*"))
