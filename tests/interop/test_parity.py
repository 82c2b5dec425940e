"""Logits and layer outputs of the transformers library, committed by tests/fixtures/make_parity.py, and live."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CASES, FIXTURES, TINY, copy, drawn, edit_config, tokens

from attnres_jax.config import DepthConfig
from attnres_jax.interop import load_pretrained, save_pretrained
from attnres_jax.models import unrolled

TOLERANCE = 2e-5


def relative(x, y):
    return float(np.abs(x - y).max() / np.abs(y).max())


def given(parity, name):
    """A batch, and which of its tokens are real."""
    batch = [jnp.asarray(parity[f"{name}_{key}"]) for key in ("tokens", "mask", "positions")]
    return batch, np.asarray(batch[1], bool)


def logits_error(model, parity, name):
    """The worst relative difference of the scan's logits at real tokens."""
    batch, real = given(parity, name)
    ours = jax.jit(lambda model, *batch: model(*batch))(model, *batch)
    return relative(np.asarray(ours)[real], parity[f"{name}_logits"][real])


def compare(directory, parity):
    """The worst relative differences of layers and of logits, over both batches, at real tokens."""
    model = load_pretrained(directory)
    layers, logits = [], []
    for name in ("long", "padded"):
        batch, real = given(parity, name)
        trace = jax.jit(unrolled)(model, *batch)
        for i, theirs in enumerate(parity[f"{name}_layers"]):
            layers.append(relative(np.asarray(trace.states[2 * i + 1])[real], theirs[real]))
        logits.append(relative(np.asarray(trace.logits)[real], parity[f"{name}_logits"][real]))
        logits.append(logits_error(model, parity, name))
    return max(layers), max(logits)


@pytest.mark.parametrize("case", CASES)
def test_layers_and_logits_equal_those_of_transformers(case):
    """A row of 200 tokens, and rows padded left, right and not at all."""
    layers, logits = compare(FIXTURES / case, np.load(FIXTURES / case / "parity.npz"))
    print(f"{case}: layers {layers:.1e}, logits {logits:.1e}")
    assert layers < TOLERANCE and logits < TOLERANCE


@pytest.mark.parametrize(
    "case, changes",
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 900_000.0}}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"topk_group": 4}),
        ("deepseek_v3", {"routed_scaling_factor": 1.8}),
        ("kimi_linear", {"router_weight_uses_score_correction_bias": True}),
        ("kimi_linear", {"rms_norm_eps": 1e-3}),
    ],
)
def test_settings_that_matter_are_heard(case, changes, tmp_path):
    """The committed numbers tell a wrong reading of a setting apart."""
    directory = copy(case, tmp_path / case)
    edit_config(directory, **changes)
    parity = np.load(FIXTURES / case / "parity.npz")
    assert logits_error(load_pretrained(directory), parity, "padded") > 10 * TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_live_parity(case, tmp_path):
    """New fixtures of the library at hand; and the committed ones are those that it would make."""
    script = runpy.run_path(str(FIXTURES / "make_parity.py"))
    script["make"](case, tmp_path)
    parity = np.load(tmp_path / "parity.npz")
    committed = np.load(FIXTURES / case / "parity.npz")
    assert max(relative(parity[key], committed[key]) for key in parity if "logits" in key) < TOLERANCE
    layers, logits = compare(tmp_path, parity)
    print(f"{case}, live: layers {layers:.1e}, logits {logits:.1e}")
    assert layers < TOLERANCE and logits < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("case", [*CASES, "ours"])
def test_transformers_loads_what_is_exported(case, tmp_path):
    """The same logits from the export, with nothing missing and nothing left over."""
    import torch
    import transformers

    if case == "ours":
        model = drawn(dataclasses.replace(TINY, depth=DepthConfig(rule="residual", block_size=2)))
    else:
        model = load_pretrained(FIXTURES / case)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=50_000)
    assert len(list(Path(tmp_path / "out").glob("*.safetensors"))) > 1 or case == "ours"
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    batch = tokens()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(np.array(batch)).long()).logits.numpy()
    assert relative(np.asarray(jax.jit(lambda m, t: m(t))(model, batch)), logits) < TOLERANCE
