"""Kimi Linear's format: what writers of it leave open, damaged settings, and quantised tensors that are copied."""

import json

import numpy as np
import pytest
from checkpoints import FIXTURES, copy, edit_config, rewrite, same_bytes, tensors
from numerics import worst

from attnres_jax.interop import InteropError, convert, load_pretrained, save_pretrained
from attnres_jax.interop.report import inspect_text
from attnres_jax.interop.store import TensorStore
from attnres_jax.models import FAMILIES, preset

CONFIG = json.loads((FIXTURES / "kimi_linear/config.json").read_text())
LINEAR = CONFIG["linear_attn_config"]


def same_model(left, right):
    """Bit for bit."""
    return worst(load_pretrained(left), load_pretrained(right)) == 0


def test_the_dense_layers_under_the_experts_name(tmp_path):
    """As transformers 5.23 writes them; written back like that only to be like it."""

    def rename(held):
        for name in [name for name in held if ".mlp." in name]:
            held[name.replace(".mlp.", ".block_sparse_moe.")] = held.pop(name)

    directory = copy("kimi_linear", tmp_path / "in")
    rewrite(directory, rename)
    assert "block_sparse_moe.gate_proj.weight" in inspect_text(directory)
    assert same_model(directory, FIXTURES / "kimi_linear")
    model = load_pretrained(directory)
    save_pretrained(model, tmp_path / "like", like=directory)
    assert same_bytes(tensors(tmp_path / "like"), tensors(directory))
    save_pretrained(model, tmp_path / "out")
    assert same_bytes(tensors(tmp_path / "out"), tensors(FIXTURES / "kimi_linear"))


@pytest.mark.parametrize("shape", [(3,), (128,), (1, 1, 64, 1)])
def test_decay_rates_of_any_layout(shape, tmp_path):
    """Bare, padded as in Kimi K3, or both; what was there is what is written."""

    def change(held):
        for name in [name for name in held if name.endswith("A_log")]:
            held[name] = np.pad(held[name].reshape(-1), (0, np.prod(shape) - 3)).reshape(shape)

    directory = copy("kimi_linear", tmp_path / "in")
    rewrite(directory, change)
    assert same_model(directory, FIXTURES / "kimi_linear")
    save_pretrained(load_pretrained(directory), tmp_path / "out", like=directory)
    assert same_bytes(tensors(tmp_path / "out"), tensors(directory))


@pytest.mark.parametrize("shape", [(2,), (3, 2), ()])
def test_decay_rates_that_do_not_fit(shape, tmp_path):
    directory = copy("kimi_linear", tmp_path / "in")
    rewrite(directory, lambda held: held.update({"model.layers.0.self_attn.A_log": np.zeros(shape, np.float32)}))
    with pytest.raises(InteropError, match=r"1 of another shape: model\.layers\.0\.self_attn\.A_log"):
        load_pretrained(directory)


def test_special_tokens_are_within_the_vocabulary():
    """transformers has Kimi's ids where none are given, and cannot embed a padding token that does not exist."""
    family, names = FAMILIES["kimi_linear"], ("bos_token_id", "eos_token_id", "pad_token_id")
    written = family.write(family.read(CONFIG))
    assert [written[name] for name in names] == [None] * 3
    assert not set(names) & set(family.write(preset("kimi-linear-48b-a3b")))


def test_layers_by_lists_of_kinds():
    """`linear_attn_config` of released models, or the lists that transformers derives from it."""
    family = FAMILIES["kimi_linear"]
    names = ("linear_attn_config", "first_k_dense_replace")
    derived = {key: value for key, value in CONFIG.items() if key not in names}
    released = {key: value for key, value in CONFIG.items() if not key.endswith("layer_types")}
    assert family.read(derived) == family.read(released) == family.read(CONFIG)
    assert family.read(CONFIG).attention_layers == "kda*2,mla,kda,mla"
    other = {key: value for key, value in CONFIG.items() if key != "model_max_length"}
    assert family.read(other | {"max_position_embeddings": 77}).max_length == 77
    biased = CONFIG | {"router_weight_uses_score_correction_bias": True}
    assert not (set(biased) - set(CONFIG)) & set(family.write(family.read(CONFIG)))
    assert set(biased) - set(CONFIG) <= set(family.write(family.read(biased)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"linear_attn_config": [1]}, r"linear_attn_config=\[1\] must be a group of settings"),
        ({"linear_attn_config": LINEAR | {"kda_layers": 5}}, "must name each of the layers 1 to 5 once"),
        ({"linear_attn_config": LINEAR | {"kda_layers": ["1", 2, 4]}}, "must name each of the layers 1 to 5 once"),
        ({"linear_attn_config": LINEAR | {"kda_layers": [0, 1, 3]}}, "must name each of the layers 1 to 5 once"),
        ({"linear_attn_config": LINEAR | {"head_dim": "8"}}, "head_dim='8' must be int"),
        ({"linear_attn_config": LINEAR | {"gate_lower_bound": "-5"}}, "gate_lower_bound='-5' must be a number"),
        ({"linear_attn_config": LINEAR | {"gate_lower_bound": 5.0}}, "gate_lower_bound=5.0 must be negative"),
        ({"linear_attn_config": LINEAR | {"use_full_rank_gate": 1}}, "use_full_rank_gate=1 must be bool"),
        ({"linear_attn_config": None, "layer_types": ["linear_attention"]}, "layer_types must name a kind for each"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must name a kind for each of 5 layers: dense, sparse"),
        ({"mlp_layer_types": 5}, "mlp_layer_types must name a kind"),
        ({"mlp_layer_types": [["dense"]] * 5}, "mlp_layer_types must name a kind"),
    ],
)
def test_settings_that_are_refused(changes, message, tmp_path):
    directory = copy("kimi_linear", tmp_path / "in")
    edit_config(directory, **changes)
    with pytest.raises(InteropError, match=message):
        load_pretrained(directory)


def test_quantised_tensors_are_copied_or_written_as_plain_ones(tmp_path):
    """A conversion copies the bytes and lists them; what is saved says no more that it is quantised."""

    def quantise(held):
        for name in [name for name in held if name.endswith("w1.weight")]:
            rows, width = held.pop(name).shape
            held[f"{name}_packed"] = np.full((rows, width // 2), 0x21, np.uint8)
            held[f"{name}_scale"] = np.full((rows, width // 32), 126, np.uint8)

    directory = copy("kimi_linear", tmp_path / "in")
    rewrite(directory, quantise)
    edit_config(directory, quantization_config={"format": "mxfp4-pack-quantized"})
    convert(directory, tmp_path / "converted")
    held = tensors(tmp_path / "converted")
    before = tensors(directory)
    assert same_bytes({name: held[name] for name in before}, before)
    index = json.loads((tmp_path / "converted/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(held)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
    assert "quantization_config" in json.loads((tmp_path / "converted/config.json").read_text())
    model = load_pretrained(tmp_path / "converted")
    save_pretrained(model, tmp_path / "out", like=tmp_path / "converted")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    np.testing.assert_array_equal(TensorStore(tmp_path / "out").read(name)[0, :4], [0.25, 0.5, 0.25, 0.5])
    assert same_model(tmp_path / "out", tmp_path / "converted")
