"""Loading and saving: the same bytes back, K3's names, shards, meshes, dtypes, and what is refused."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest
from checkpoints import (
    CASES,
    COMPANIONS,
    FIXTURES,
    TINY,
    copy,
    drawn,
    edit_config,
    rewrite,
    same_bytes,
    tensors,
    tokens,
)
from numerics import worst

from attnres_jax.config import DepthConfig
from attnres_jax.interop import InteropError, load_pretrained, save_pretrained
from attnres_jax.interop.binding import bind
from attnres_jax.interop.errors import need
from attnres_jax.interop.pretrained import to_theirs
from attnres_jax.interop.tables import MATRIX, TABLES, Table, Tensor
from attnres_jax.models import named_leaves

RESIDUAL = dataclasses.replace(TINY, depth=DepthConfig(rule="residual", block_size=2))

WIDE = ("correction_bias", "A_log", "dt_bias")
HELD_WIDE = ("correction_bias", "log_rate", "decay_bias")
"""Held, and released, in float32."""


def logits(model):
    return jax.jit(lambda model, tokens: model(tokens))(model, tokens())


def refused(directory, **options):
    with pytest.raises(InteropError) as error:
        load_pretrained(directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_load_and_export_give_the_same_bytes(case, dtype, tmp_path):
    directory = copy(case, tmp_path / "in")
    kind = np.dtype(dtype if dtype != "bfloat16" else jax.numpy.bfloat16)
    halved = lambda held: {name: x.astype(kind) for name, x in held.items() if not name.endswith(WIDE)}  # noqa: E731
    rewrite(directory, lambda held: held.update(halved(held)))
    edit_config(directory, dtype=dtype)
    model = load_pretrained(directory)
    for name, leaf in named_leaves(model).items():
        assert leaf.dtype == (np.float32 if name.endswith(HELD_WIDE) else kind)
    save_pretrained(model, tmp_path / "out")
    assert same_bytes(tensors(tmp_path / "out"), tensors(directory))
    wide = load_pretrained(directory, param_dtype="float32", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    save_pretrained(wide, tmp_path / "like", like=directory, max_shard_bytes=20_000)
    assert same_bytes(tensors(tmp_path / "like"), tensors(directory))
    assert json.loads((tmp_path / "like/config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )
    assert (tmp_path / "like/generation_config.json").exists()


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored_in_bfloat16_is_multiplied_in_float32(case, tmp_path):
    """With float32 activations the numbers are those of parameters that were widened first, every family's."""
    save_pretrained(load_pretrained(FIXTURES / case), tmp_path / "in", like=None, dtype="bfloat16")
    stored = load_pretrained(tmp_path / "in", residual="block", dtype="float32")
    wide = load_pretrained(tmp_path / "in", residual="block", dtype="float32", param_dtype="float32")
    for model in (stored, wide):
        draw = jax.random.normal(jax.random.key(5), model.sites.query.shape).astype(jax.numpy.bfloat16)
        model.sites.query[...] = draw.astype(model.sites.query.dtype)
        model.sites.key_scale[...] = (1.3 * abs(draw)).astype(model.sites.key_scale.dtype)
    assert stored.sites.query.dtype == jax.numpy.bfloat16 and wide.sites.query.dtype == np.float32
    assert worst(logits(stored), logits(wide)) < 2e-5


def test_kimi_k3s_names_in_any_family_and_its_unit(tmp_path):
    """Queries are [1, D]; a block of 4 sublayers is one of 2 layers; site by site the rows are where they belong."""
    model = drawn()
    save_pretrained(model, tmp_path / "out")
    held, values = tensors(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    assert values["attn_res_block_size"] == 2 and values["model_type"] == "qwen3"
    queries, scales = np.asarray(model.sites.query[...]), np.asarray(model.sites.key_scale[...])
    places = {
        f"model.layers.{i}.{name}": 2 * i + j for i in range(5) for j, name in enumerate(("self_attention", "mlp"))
    }
    for name, site in {**places, "model.output_attn": 10}.items():
        assert held[f"{name}_res_proj.weight"].shape == (1, 16)
        np.testing.assert_array_equal(held[f"{name}_res_proj.weight"][0], queries[site])
        np.testing.assert_array_equal(held[f"{name}_res_norm.weight"], scales[site])
    assert sum("_res_" in name for name in held) == 2 * 11
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.config.depth == TINY.depth
    assert worst(logits(loaded), logits(model)) == 0
    save_pretrained(loaded, tmp_path / "again", like=tmp_path / "out", max_shard_bytes=3000)
    assert same_bytes(tensors(tmp_path / "again"), held)


@pytest.mark.parametrize("size, sublayers", [(1, 2), (3, 6), (5, 10), (12, 10)])
def test_block_sizes_in_layers(size, sublayers, tmp_path):
    """A block beyond the stack is the stack, and its number survives a round trip."""
    save_pretrained(drawn(), tmp_path / "out")
    edit_config(tmp_path / "out", attn_res_block_size=size)
    model = load_pretrained(tmp_path / "out")
    assert model.config.depth == DepthConfig(rule="block", block_size=sublayers)
    save_pretrained(model, tmp_path / "again", like=tmp_path / "out")
    assert json.loads((tmp_path / "again/config.json").read_text())["attn_res_block_size"] == size


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_impossible_block_sizes(size, tmp_path):
    directory = copy("llama", tmp_path / "in")
    edit_config(directory, attn_res_block_size=size)
    assert f"attn_res_block_size={size!r} must be a positive number of transformer layers" in refused(directory)


def test_a_rule_given_at_loading(tmp_path):
    """New sites at their start: the same function; a checkpoint with sites of its own takes no other rule."""
    save_pretrained(drawn(RESIDUAL), tmp_path / "plain")
    plain = load_pretrained(tmp_path / "plain")
    for rule in ("block", "full", "mhc", "denseformer"):
        model = load_pretrained(tmp_path / "plain", residual=rule)
        assert model.config.depth.rule == rule
        assert worst(logits(model), logits(plain)) < 1e-5
    own = load_pretrained(tmp_path / "plain", residual=DepthConfig(rule="block", block_size=6))
    assert own.config.depth.block_size == 6
    assert "model.depth.rule='blok' is unknown" in refused(tmp_path / "plain", residual="blok")
    save_pretrained(drawn(), tmp_path / "block")
    assert load_pretrained(tmp_path / "block", residual="block").config.depth == TINY.depth
    assert "under 'full' it would be another function" in refused(tmp_path / "block", residual="full")


def test_a_host_reads_what_its_devices_hold(tmp_path):
    """On 8 devices each parameter is cut along an axis; no read is larger than a shard's part of one tensor."""
    save_pretrained(drawn(), tmp_path / "out")
    program = f"""
import numpy as np, jax, jax.numpy as jnp
from jax.sharding import Mesh
from attnres_jax.interop import load_pretrained, store
reads = []
read = store.TensorStore.read
def counted(self, name, index=None):
    x = read(self, name, index)
    reads.append((name, x.size))
    return x
store.TensorStore.read = counted
mesh = Mesh(np.array(jax.devices()), ("devices",))
model = load_pretrained({str(tmp_path / "out")!r}, mesh=mesh)
leaf = model.sublayers["swiglu"].gate.kernel[...]
assert len(leaf.addressable_shards) == 8 and leaf.addressable_shards[0].data.size == leaf.size // 8
assert max(size for name, size in reads if "gate_proj" in name) == 16 * 24 // 8
whole = load_pretrained({str(tmp_path / "out")!r})
same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), model, whole)
assert all(jax.tree.leaves(same))
tokens = jnp.arange(12)[None]
run = jax.jit(lambda model, tokens: model(tokens))
np.testing.assert_allclose(run(model, tokens), run(whole, tokens), rtol=1e-4, atol=1e-5)
"""
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"XLA_FLAGS": flags})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda held: held.pop("model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda held: held.update(more=np.zeros(2, np.float32)), "1 not part of such a model: more"),
        (
            lambda held: held.update({"model.norm.weight": np.zeros(31, np.float32)}),
            "1 of another shape: model.norm.weight [31] instead of [32]",
        ),
        (
            lambda held: [held.pop(name) for name in list(held) if "layers.1" in name],
            "9 missing: model.layers.1.input_layernorm.weight, model.layers.1.self_attn.q_proj.weight, ",
        ),
        (
            lambda held: held.update({"model.layers.3.mlp.up_proj.weight": np.zeros(2, np.float32)}),
            "1 not part of such a model: model.layers.3.mlp.up_proj.weight",
        ),
        (
            lambda held: held.update({"model.norm.weight": np.ones(32, np.int64)}),
            "tensor 'model.norm.weight' of",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    directory = copy("llama", tmp_path / "in")
    rewrite(directory, change)
    assert message in refused(directory)


def test_tensors_that_may_be_there(tmp_path):
    """Buffers of old exports, heads of multi-token prediction, and a tied head that is the embedding."""
    directory = copy("qwen3", tmp_path / "in")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "model.mtp.layers.0.weight": np.zeros(8, np.float32),
    }
    rewrite(directory, lambda held: held.update(more | {"lm_head.weight": held["model.embed_tokens.weight"]}))
    save_pretrained(load_pretrained(directory), tmp_path / "out", like=directory)
    written = tensors(tmp_path / "out")
    assert same_bytes(written, {name: x for name, x in tensors(directory).items() if name not in more})
    rewrite(directory, lambda held: held.update({"lm_head.weight": held["lm_head.weight"] * 2}))
    assert "lm_head.weight is not model.embed_tokens.weight" in refused(directory)


def test_layers_behind_the_last_one_are_those_that_config_json_counts(tmp_path):
    """Layers of multi-token prediction; what is written without them says so, and does not ask for code either."""
    directory = copy("deepseek_v3", tmp_path / "in")
    last = load_pretrained(directory).config.num_layers
    more = {f"model.layers.{last + i}.eh_proj.weight": np.zeros(8, np.float32) for i in range(2)}
    rewrite(directory, lambda held: held.update(more))
    edit_config(directory, num_nextn_predict_layers=2, auto_map={"AutoModel": "modeling.Model"})
    save_pretrained(load_pretrained(directory), tmp_path / "out", like=directory)
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["num_nextn_predict_layers"] == 0 and "auto_map" not in values
    assert set(tensors(tmp_path / "out")) == set(tensors(directory)) - set(more)
    edit_config(directory, num_nextn_predict_layers=1)
    assert f"1 not part of such a model: model.layers.{last + 1}.eh_proj.weight" in refused(directory)
    edit_config(directory, num_nextn_predict_layers="1")
    assert "num_nextn_predict_layers='1' is no number of layers" in refused(directory)
    edit_config(directory, num_nextn_predict_layers=0, num_hidden_layers=last - 1)
    assert f"not part of such a model: model.layers.{last - 1}." in refused(directory)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is unknown; known: deepseek_v3, "),
        ({"model_type": ["llama"]}, "model_type=['llama'] is unknown"),
        ({"hidden_size": "32"}, "hidden_size='32' must be int"),
        ({"hidden_size": True}, "hidden_size=True must be int"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not one of 1 to 10000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not one of 1 to 10000"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing, with rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope' is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}},
            "rope_parameters.attention_factor=1.0 is not supported; supported: null",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "rope_parameters.truncate=False is not supported; supported: true",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type=['yarn'] is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' must be a number"),
        ({"rope_parameters": [1]}, "is not supported; supported: one flat group"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_settings_that_are_refused(changes, message, tmp_path):
    directory = copy("llama", tmp_path / "in")
    edit_config(directory, **changes)
    assert message in refused(directory)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("qwen3", {"layer_types": 5}, "layer_types=5 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": 5}, "mlp_only_layers=5 must be a list of layers"),
        ("qwen3_moe", {"num_hidden_layers": -1}, "num_hidden_layers=-1 is not one of"),
        ("qwen3_moe", {"num_experts": 10**12}, "num_experts=1000000000000 is not one of 0 to 65536"),
        ("deepseek_v3", {"n_routed_experts": 10**12}, "n_routed_experts=1000000000000 is not one of 0 to 65536"),
    ],
)
def test_settings_of_a_family_that_are_refused(case, changes, message, tmp_path):
    directory = copy(case, tmp_path / "in")
    edit_config(directory, **changes)
    assert message in refused(directory)


def test_places_that_are_refused(tmp_path):
    assert "neither a directory nor a repository id" in refused(tmp_path / "nowhere" / "at" / "all")
    assert "config.json does not exist" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refused(tmp_path)


def test_what_cannot_be_saved_leaves_nothing(tmp_path):
    def attempt(message, model=None, target=tmp_path / "out", **options):
        with pytest.raises(InteropError) as error:
            save_pretrained(drawn() if model is None else model, target, **options)
        assert message in str(error.value) and "\n" not in str(error.value)

    full = dataclasses.replace(TINY, depth=DepthConfig(rule="full", block_size=2))
    attempt("model.depth.rule='full' with block_size=2", drawn(full))
    attempt("is another model: it differs in", like=FIXTURES / "qwen3")
    attempt("quantised=True needs like=DIRECTORY, of a checkpoint with quantised tensors", quantised=True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    attempt("is not an empty directory", target=tmp_path / "used")
    attempt("is not an empty directory", target=tmp_path / "used" / "file")

    def fail(directory):
        raise KeyboardInterrupt

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # as a full disk
    try:
        attempt("cannot be written: ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(drawn(), tmp_path / "out", write_more=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    (tmp_path / "empty").mkdir()
    save_pretrained(drawn(), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_to_what_it_names(there, tmp_path):
    """To an empty directory, or to none yet; the link stays."""
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_pretrained(drawn(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_asked_for_is_of_all_tensors_and_in_config_json(key, tmp_path):
    """Whatever `like` has, but for rows with a dtype of their own."""
    directory = copy("kimi_linear", tmp_path / "in")
    edit_config(directory, **{"dtype": None, "torch_dtype": None, key: "float32"})
    model = load_pretrained(directory)
    for name, like, written in (("like", directory, key), ("out", None, "dtype")):
        save_pretrained(model, tmp_path / name, like=like, dtype="bfloat16")
        for tensor, x in tensors(tmp_path / name).items():
            assert x.dtype == (np.float32 if tensor.endswith(WIDE) else jax.numpy.bfloat16), tensor
        assert json.loads((tmp_path / name / "config.json").read_text())[written] == "bfloat16"
        assert load_pretrained(tmp_path / name).config.dtype == "bfloat16"
    save_pretrained(model, tmp_path / "half", dtype="float16")
    assert load_pretrained(tmp_path / "half").config.dtype == "float32"


def test_float64_survives_where_jax_has_it(tmp_path):
    directory = copy("llama", tmp_path / "in")
    rewrite(directory, lambda held: held.update({name: x.astype(np.float64) for name, x in held.items()}))
    with jax.enable_x64(True):
        save_pretrained(load_pretrained(directory), tmp_path / "out")
    assert same_bytes(tensors(tmp_path / "out"), tensors(directory))


def test_a_repository_is_fetched_without_code(tmp_path, monkeypatch):
    """A stand-in for the hub: what is asked of it, and its failure in one line."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if "nowhere" in name:
            raise ValueError("no such\nrepository")
        return str(FIXTURES / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_pretrained("owner/name").config.num_layers == 3
    name, patterns = asked[0]
    assert name == "owner/name"
    assert {*patterns} == {"config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS}
    assert "cannot be fetched from the hub: no such repository" in refused("owner/nowhere")


def test_unknown_dtypes(tmp_path):
    assert "param_dtype='int4' is unknown; known: float32" in refused(FIXTURES / "llama", param_dtype="int4")
    assert "model.dtype='float16' is unknown" in refused(FIXTURES / "llama", dtype="float16")
    with pytest.raises(InteropError, match="'int4' is unknown"):
        save_pretrained(drawn(), tmp_path / "out", dtype="int4")


def test_a_missing_library_is_named():
    with pytest.raises(
        InteropError, match=r"nolibrary is not installed; install it with: pip install 'attnres_jax\[hf\]'"
    ):
        need("nolibrary.sub")


def test_a_table_with_experts_and_odd_layouts():
    """What other families need: stacks of experts, axes of size 1, and a parameter without a name."""
    rows = (
        Tensor("gate", "moe.experts.{expert}.w1.weight", MATRIX),
        Tensor("conv", "conv.weight", (2, 0), rank=3, dtype="float32"),
        Tensor("decay", "A_log", (2,), rank=4),
        Tensor("absent", "absent"),
    )
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)  # noqa: E731
    shapes = {
        "sublayers.moe.gate": shape(2, 3, 4, 5),
        "sublayers.moe.conv": shape(2, 4, 7),
        "sublayers.moe.decay": shape(2, 6),
    }
    table = Table(whole=(), sublayers={"moe": rows, "other": ()}, prefix="language_model.")
    bindings = bind(table, shapes, ["other", "moe", "other", "moe"])
    assert len(bindings) == 2 * (3 + 1 + 1)
    by_name = {binding.theirs: binding for binding in bindings}
    expert = by_name["language_model.model.layers.1.moe.experts.2.w1.weight"]
    assert (expert.ours, expert.index, expert.shape) == ("sublayers.moe.gate", (1, 2), (5, 4))
    conv = by_name["language_model.model.layers.0.conv.weight"]
    assert (conv.shape, conv.dtype) == ((7, 1, 4), "float32")
    x = np.arange(28).reshape(4, 7)
    np.testing.assert_array_equal(to_theirs(x, conv), x.T[:, None])
    assert by_name["language_model.model.layers.1.A_log"].shape == (1, 1, 6, 1)
    with pytest.raises(InteropError, match="parameter 'x' has no name in this format"):
        bind(table, shapes | {"x": shape(3)}, ["other", "moe", "other", "moe"])
    with pytest.raises(InteropError, match="sublayers of kind 'new' have no names"):
        bind(table, shapes, ["new"])


def test_every_parameter_is_read_once():
    """Both directions of the table: the parts of all tensors make every parameter, each element once."""
    leaves = named_leaves(drawn())
    bindings = bind(TABLES["qwen3"], leaves, drawn().plan())
    assert len({b.theirs for b in bindings}) == len({(b.ours, b.index) for b in bindings}) == len(bindings)
