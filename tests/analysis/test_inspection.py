import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax import build_model
from attnres_jax.analysis import (
    compare,
    depth_mixing,
    depth_weights,
    inspect_model,
    inspect_run,
    is_inspected,
    magnitudes,
    read_run,
    write_report,
)
from attnres_jax.analysis.inspection import MAGNITUDES
from attnres_jax.config import DepthConfig, ModelConfig
from attnres_jax.depth import RULES
from attnres_jax.models import unrolled
from attnres_jax.training import ChangedTextError

CASES = [(rule, 2) for rule in RULES] + [("block", 4), ("rms_block", 4), ("delta_block", 4)]
EVEN = [("block", 4), ("block", 2), ("full", 2), ("rms_block", 4), ("delta", 2), ("delta_block", 2)]


def make(rule, block_size, *, learned=True):
    """Three layers, so that blocks of four sublayers leave a short last one."""
    depth = DepthConfig(rule=rule, block_size=block_size)
    config = ModelConfig(
        vocab_size=30, width=8, num_layers=3, num_heads=2, num_kv_heads=1, mlp_width=12, max_length=16, depth=depth
    )
    model = build_model(config, rngs=nnx.Rngs(0))
    if learned:
        size = 0.1 if rule == "muddformer" else 0.5  # products of its weights amplify the rounding of float32
        model.sites = jax.tree.map(lambda x: x + size * jax.random.normal(jax.random.key(1), x.shape), model.sites)
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


@pytest.mark.parametrize(("rule", "block_size"), CASES)
def test_agrees_with_the_whole_batch_at_once(rule, block_size, batch):
    model = make(rule, block_size)
    arguments = [jnp.asarray(batch[key]) for key in ("inputs", "segment_ids", "positions")]

    def loss(probes):
        log_p = jax.nn.log_softmax(unrolled(model, *arguments, probes=probes).logits)
        picked = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["weights"])

    trace, gradients = jax.jit(lambda probes: (unrolled(model, *arguments), jax.grad(loss)(probes)))(
        jnp.zeros((6, 2, 12, 8))
    )
    arrays = (trace.outputs, trace.states, gradients, trace.inputs)
    real = batch["segment_ids"] > 0
    inspection = inspect_model(model, batch)
    for key, array in zip(MAGNITUDES, arrays, strict=True):
        expected = [np.sqrt(np.mean(np.square(np.asarray(one)[real]))) for one in array]
        np.testing.assert_allclose(getattr(inspection, key), expected, rtol=2e-5, err_msg=key)
    assert inspection.mixing_matrix.shape == (7, 7) and inspection.mixing_matrix.dtype == np.float32
    for rows, expected in ((inspection.mixing_matrix, trace.matrix), (inspection.depth_weights, trace.weights)):
        if expected is None:
            assert rows is None and depth_weights(model, batch) is None
            continue
        for row, weights in zip(rows, expected, strict=True):
            mean = np.asarray(weights)[:, real].mean(1)
            np.testing.assert_allclose(row[: len(mean)], mean, rtol=1e-5, atol=1e-6)
            assert np.isnan(row[len(mean) :]).all()
    if rule in dict(EVEN):
        np.testing.assert_allclose(np.nansum(inspection.depth_weights, axis=1), 1, rtol=1e-6)
    if rule == "residual":
        np.testing.assert_array_equal(inspection.mixing_matrix, np.where(np.tri(7), 1, np.nan))


def test_what_stands_in_padding_changes_nothing(batch):
    model = make("block", 4)
    other = {key: value.copy() for key, value in batch.items()}
    other["inputs"][1, 8:] = 7
    other["targets"][1, 8:] = 3
    padding = {key: np.concatenate([value, np.zeros_like(value[:1])]) for key, value in other.items()}
    one, two, rms = inspect_model(model, batch), inspect_model(model, padding), magnitudes(model, padding)
    for key in (*MAGNITUDES, "depth_weights", "mixing_matrix"):
        np.testing.assert_array_equal(getattr(one, key), getattr(two, key))
    assert set(rms) == set(MAGNITUDES)
    for key in MAGNITUDES:
        np.testing.assert_array_equal(getattr(one, key), rms[key])


@pytest.mark.parametrize(("rule", "block_size"), EVEN)
def test_an_untrained_model_reads_evenly(rule, block_size, batch):
    inspection = inspect_model(make(rule, block_size, learned=False), batch)
    weights = inspection.depth_weights
    if rule.startswith("delta"):  # the null source has no direction: it is even as well
        np.testing.assert_allclose(depth_mixing(inspection.mixing_matrix).evenness[1:], 1, atol=0.05)
    elif rule in ("block", "full"):
        np.testing.assert_allclose(depth_mixing(inspection.mixing_matrix).evenness[1:], 1, rtol=1e-6)
    counts = np.isfinite(weights).sum(1, keepdims=True)
    np.testing.assert_allclose(np.where(np.isfinite(weights), weights * counts, 1), 1, rtol=1e-6)


def test_labels_name_what_the_rule_reads(batch):
    sublayers = ["attention 1", "MLP 1", "attention 2", "MLP 2", "attention 3", "MLP 3"]
    labels = {}
    for rule, block_size in (*EVEN, ("residual", 2), ("denseformer", 2), ("muddformer", 2)):
        inspection = inspect_model(make(rule, block_size), batch)
        assert inspection.site_labels == (*sublayers, "readout")
        assert inspection.output_labels == ("embedding", *sublayers)
        labels[rule, block_size] = inspection.source_labels
    assert labels["residual", 2] == ()
    assert labels["block", 4] == ("embedding", "block 1", "block 2")
    assert labels["block", 2] == ("embedding", "block 1", "block 2", "block 3")
    assert labels["full", 2] == labels["denseformer", 2] == ("embedding", *sublayers)
    assert labels["delta", 2] == ("null", *sublayers)
    assert labels["delta_block", 2] == ("null", "block 1", "block 2", "block 3")
    assert labels["muddformer", 2] == ("embedding", *(f"after {sublayer}" for sublayer in sublayers))


def test_every_rule_has_its_place_in_a_report(make_run, batch, tmp_path):
    workdirs = []
    for rule in RULES:
        workdirs.append(make_run(rule, rule, inspected=False))
        inspect_model(make(rule, 2), batch).save(workdirs[-1] / "inspection.npz")
    page = write_report(compare(workdirs), tmp_path / "report.html").read_text()
    for rule in RULES:
        assert page.count(f"Heat map of the depth-mixing matrix of tiny_{rule}, ") == 1
    assert page.count("Heat map of the depth weights of") == 7
    assert "nan" not in page.partition("separable rank</th>")[2].partition("</tr>")[0]


def test_run_is_inspected_into_its_workdir(real_run):
    before = read_run(real_run).inspection
    inspection = inspect_run(real_run)
    for key in MAGNITUDES:
        np.testing.assert_array_equal(before[key], getattr(inspection, key))
    np.testing.assert_array_equal(before["depth_weights"], inspection.depth_weights)
    np.testing.assert_array_equal(before["mixing_matrix"], inspection.mixing_matrix)
    assert list(before["output_labels"]) == ["embedding", "attention 1", "MLP 1", "attention 2", "MLP 2"]
    assert list(before["source_labels"]) == ["embedding", "block 1", "block 2"] == list(inspection.source_labels)
    assert before["depth_weights"].shape == (5, 3)
    assert not list(real_run.glob(".inspection*"))


def test_text_that_has_changed_is_not_inspected(real_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(real_run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["heldout_percent"] = 40
    (workdir / "config.json").write_text(json.dumps(config))
    before = (workdir / "inspection.npz").read_bytes()
    with pytest.raises(ChangedTextError, match="has changed since step 8"):
        inspect_run(workdir)
    assert (workdir / "inspection.npz").read_bytes() == before


def test_an_inspection_of_another_step_is_told(real_run, tmp_path):
    """Someone looked at a run half way, and it went on."""
    workdir = tmp_path / "run"
    shutil.copytree(real_run, workdir)
    assert is_inspected(workdir) and read_run(workdir).notes == ()
    arrays = dict(np.load(workdir / "inspection.npz"))
    np.savez(workdir / "inspection.npz", **arrays | {"step": 4})
    assert not is_inspected(workdir)
    assert read_run(workdir).notes == (f"{workdir} was inspected at step 4 of the 8 that it has trained.",)
    (workdir / "inspection.npz").write_bytes(b"PK")
    assert not is_inspected(workdir)
