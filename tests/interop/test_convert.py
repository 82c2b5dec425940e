"""Residual checkpoints become AttnRes without loss, and `verify` says how far apart two models are, and why."""

import dataclasses
import json
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CASES, COMPANIONS, FIXTURES, copy, drawn, rewrite, same_bytes, tensors
from numerics import worst

from attnres_jax.interop import InteropError, convert, load_pretrained, save_pretrained, verify
from attnres_jax.interop.config_json import with_depth
from attnres_jax.interop.convert import with_config
from attnres_jax.interop.report import inspect_text
from attnres_jax.models import FAMILIES, preset

PARITY = {case: np.load(FIXTURES / case / "parity.npz") for case in CASES}


def batch(case, name="padded"):
    return [PARITY[case][f"{name}_{key}"] for key in ("tokens", "mask", "positions")]


QUICK = [*((case, 2 if case == "kimi_linear" else 0) for case in CASES), ("llama", 1), ("llama", 2), ("llama", 3)]
SLOW = [pytest.param(*one, marks=pytest.mark.slow) for one in product(CASES, range(4)) if one not in QUICK]


@pytest.mark.parametrize("case, layers_per_block", QUICK + SLOW)
def test_the_logits_are_those_of_the_original(case, layers_per_block, tmp_path):
    """Those of transformers, and of every sublayer within rounding; tensors byte for byte."""
    convert(FIXTURES / case, tmp_path / "out", layers_per_block=layers_per_block)
    original, converted = load_pretrained(FIXTURES / case), load_pretrained(tmp_path / "out")
    assert converted.config.depth.rule == "block"
    assert converted.config.depth.block_size == 2 * (layers_per_block or 1)
    found = verify(original, converted, *batch(case))
    assert found.logits < 2e-6 and found.layers.max() < 2e-6 and found.same
    assert found.largest.shape == found.layers.shape and found.largest.max() < 1e-4
    mask = batch(case)[1]
    assert found.cause.startswith(("rounding", "none")) and found.tokens == (mask > 0).sum() < mask.size
    logits = np.asarray(jax.jit(lambda m, *b: m(*b))(converted, *batch(case)))[mask > 0]
    theirs = PARITY[case]["padded_logits"][mask > 0]
    assert np.abs(logits - theirs).max() < 2e-5 * np.abs(theirs).max()
    held, before = tensors(tmp_path / "out"), tensors(FIXTURES / case)
    assert same_bytes({name: held[name] for name in before}, before)
    assert {name for name in held if name not in before} == {name for name in held if "_res_" in name}
    # What is loaded is ready for fine-tuning: the queries have a gradient.
    loss = lambda model: (model(*map(jnp.asarray, batch(case))) ** 2).mean()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(converted).sites.query[...]
    assert float(np.abs(gradient[1:]).max(1).min()) > 0


def test_small_streams_are_lossless_too_and_without_sum_sources_the_eps_is_named(tmp_path):
    """Embeddings of a fresh model (0.02), where eps weighs most: K3's format alone loses, with `attn_res_sum` not."""
    directory = copy("llama", tmp_path / "in")
    rewrite(directory, lambda held: held.update({n: 0.02 * x for n, x in held.items() if "embed" in n or "_proj" in n}))
    original, found = load_pretrained(directory), {}
    for sum_sources in (True, False):
        convert(directory, tmp_path / str(sum_sources), layers_per_block=1, sum_sources=sum_sources)
        model = load_pretrained(tmp_path / str(sum_sources))
        found[sum_sources] = verify(original, model, *batch("llama"))
    assert found[True].logits < 2e-6 and found[True].same
    assert found[False].logits > 1e-2 and not found[False].same
    assert found[False].cause.startswith("the eps of the norms")


def test_of_several_files_and_in_bfloat16(tmp_path):
    import ml_dtypes

    model = load_pretrained(FIXTURES / "qwen3")
    save_pretrained(model, tmp_path / "in", dtype="bfloat16", max_shard_bytes=20_000)
    for name in (*COMPANIONS, "modeling.py"):
        (tmp_path / "in" / name).write_text(name)
    convert(tmp_path / "in", tmp_path / "out")
    held = tensors(tmp_path / "out")
    assert {x.dtype for x in held.values()} == {np.dtype(ml_dtypes.bfloat16)}
    others = {path for path in (tmp_path / "out").iterdir() if "safetensors" not in path.name}
    assert {path.name for path in others} == COMPANIONS | {"config.json"}
    assert all(path.read_text() == path.name for path in others if path.name != "config.json")
    files = set(json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"].values())
    assert "model-attention-residuals.safetensors" in files and len(files) > 2
    assert verify(load_pretrained(tmp_path / "in"), load_pretrained(tmp_path / "out"), *batch("qwen3")).same


def test_models_that_are_not_the_same(tmp_path):
    convert(FIXTURES / "qwen3", tmp_path / "out")
    original, converted = load_pretrained(FIXTURES / "qwen3"), load_pretrained(tmp_path / "out")
    converted.sites.query[...] += 0.1
    found = verify(original, converted, *batch("qwen3"))
    assert not found.same and "the queries are not zero" in found.cause
    other = load_pretrained(FIXTURES / "qwen3", residual="block")
    turned = with_config(other, dataclasses.replace(other.config, rope_theta=77.0))
    found = verify(original, turned, *batch("qwen3"))
    assert not found.same and found.cause.startswith("unknown")
    other.embedding.table[...] *= 1.01
    found = verify(original, other, *batch("qwen3"))
    assert not found.same and found.cause.startswith("other weights: 1 of ")
    assert "embedding.table among them" in found.cause
    with pytest.raises(InteropError, match="are not one model under two rules"):
        verify(original, drawn(), *batch("qwen3"))
    assert verify(original, original, *batch("qwen3")).cause.startswith("none")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"residual": "full"}, "residual='full': a checkpoint counts the layers of a block"),
        ({"residual": "residual"}, "residual='residual': a checkpoint counts the layers of a block"),
        (
            {"layers_per_block": 100},
            "layers_per_block=100 is not one of 1 to 3, or 0 for about eight blocks; nearest: lay",
        ),
        ({"layers_per_block": -1}, "nearest: layers_per_block=1"),
    ],
)
def test_conversions_that_are_refused(options, message, tmp_path):
    with pytest.raises(InteropError) as error:
        convert(FIXTURES / "llama", tmp_path / "out", **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "case, change, message",
    [
        (
            "qwen3",
            lambda held: {"lm_head.weight": 2 * held["model.embed_tokens.weight"]},
            "lm_head.weight is not model",
        ),
        (
            "llama",
            lambda held: {"model.norm.weight": np.ones(32, np.int64)},
            "has the dtype I64, which is not supported",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_converted_nor_called_sound(case, change, message, tmp_path):
    directory = copy(case, tmp_path / "in")
    rewrite(directory, lambda held: held.update(change(held)))
    for attempt in (load_pretrained, inspect_text, lambda source: convert(source, tmp_path / "out")):
        with pytest.raises(InteropError, match=message):
            attempt(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_code_of_a_nested_text_model_does_not_come_along():
    values = FAMILIES["kimi_k3"].write(preset("kimi-k3"))
    code = {"auto_map": {"AutoModel": "modeling.Model"}}
    held = values | code | {"text_config": values["text_config"] | code}
    assert with_depth(FAMILIES["kimi_k3"], held, preset("kimi-k3")) == values


def test_a_converted_model_is_not_converted_again(tmp_path):
    convert(FIXTURES / "llama", tmp_path / "out")
    with pytest.raises(InteropError, match="is an AttnRes model already"):
        convert(tmp_path / "out", tmp_path / "again")
    save_pretrained(load_pretrained(tmp_path / "out"), tmp_path / "again")
    assert same_bytes(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
    pair = [jax.tree.leaves(load_pretrained(tmp_path / name)) for name in ("again", "out")]
    assert worst(*pair) == 0
