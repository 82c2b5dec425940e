"""Kimi K3's format against a plain float64 NumPy reading of it: every site and the logits; MXFP4; padded tensors.

The reading shares no code with the package: a list of blocks for depth, a loop over tokens for KDA, a loop over tokens
and experts for LatentMoE, and the tensors by their published names and layouts.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import edit_config, rewrite, same_bytes, tensors
from flax import nnx
from safetensors.numpy import save_file

from attnres_jax import ModelConfig, build_model
from attnres_jax.config import DepthConfig, KDAConfig, MLAConfig, MoEConfig
from attnres_jax.interop import InteropError, load_pretrained, save_pretrained
from attnres_jax.interop.store import TensorStore
from attnres_jax.models import named_leaves, unrolled

K3 = ModelConfig(
    attention_layers="kda*3,mla,kda*2,mla",
    mlp_layers="swiglu,moe*",
    vocab_size=40,
    width=16,
    num_layers=7,
    num_heads=2,
    mlp_width=20,
    activation="situ",
    max_length=1048576,
    norm_eps=1e-5,
    tie_embeddings=False,
    kda=KDAConfig(num_heads=3, head_dim=8, gate_lower_bound=-5.0, full_rank_gate=True),
    mla=MLAConfig(latent_dim=12, nope_dim=8, rope_dim=4, value_dim=6, query_rank=10, output_gate=True),
    moe=MoEConfig(num_experts=6, experts_per_token=2, expert_width=32, num_shared=2, latent_width=64, scaling=1.7),
    depth=DepthConfig(rule="block", block_size=4),
)
TOKENS = np.random.default_rng(0).integers(0, 40, 70)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, weight, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def situ(gate, up):
    return 4 * np.tanh(gate / 4) * sigmoid(gate) * 25 * np.tanh(up / 25)


class Reading:
    """One row of tokens through a directory's tensors."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())["text_config"]
        self.held = {name: np.asarray(x, np.float64) for name, x in tensors(directory).items()}

    def __call__(self, tokens):
        """(what each site read, logits)."""
        config, get = self.config, self.get
        partial, blocks, sites = get("model.embed_tokens.weight")[tokens], [], []
        full = config["linear_attn_config"]["full_attn_layers"]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = self.mix(partial, blocks, name + "self_attention_res") if blocks else partial
            sites.append(x)
            if layer % config["attn_res_block_size"] == 0:
                blocks.append(partial)
                partial = 0
            x = rms(x, get(name + "input_layernorm.weight"))
            partial = partial + (self.mla if layer + 1 in full else self.kda)(x, name + "self_attn.")
            x = self.mix(partial, blocks, name + "mlp_res")
            sites.append(x)
            x = rms(x, get(name + "post_attention_layernorm.weight"))
            dense = layer < config["first_k_dense_replace"]
            partial = partial + (self.mlp(x, name + "mlp.") if dense else self.moe(x, name + "block_sparse_moe."))
        sites.append(self.mix(partial, blocks, "model.output_attn_res"))
        return sites, rms(sites[-1], get("model.norm.weight")) @ get("lm_head.weight").T

    def get(self, name):
        return self.held["language_model." + name]

    def mix(self, partial, blocks, name):
        values = np.stack([*blocks, partial])
        scores = rms(values, self.get(name + "_norm.weight")) @ self.get(name + "_proj.weight")[0]
        weights = np.exp(scores - scores.max(0))
        return ((weights / weights.sum(0))[..., None] * values).sum(0)

    def linear(self, x, name):
        return x @ self.get(name + ".weight").T

    def kda(self, x, name):
        linear = self.config["linear_attn_config"]
        heads, width = linear["num_heads"], linear["head_dim"]
        streams = []
        for part in "qkv":
            y, taps = self.linear(x, f"{name}{part}_proj"), self.get(f"{name}{part}_conv1d.weight")[:, 0]
            padded = np.concatenate([np.zeros((3, y.shape[1])), y])
            y = sum(taps[:, i] * padded[i : i + len(y)] for i in range(4))
            streams.append((y * sigmoid(y)).reshape(-1, heads, width))
        q, k, v = streams
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        raw = self.linear(self.linear(x, name + "f_a_proj"), name + "f_b_proj") + self.get(name + "dt_bias")
        rate = np.exp(self.get(name + "A_log")[:heads])[:, None]
        decay = np.exp(linear["gate_lower_bound"] * sigmoid(rate * raw.reshape(-1, heads, width)))
        beta = sigmoid(self.linear(x, name + "b_proj"))
        out = np.zeros_like(v)
        for head in range(heads):
            state = np.zeros((width, width))
            for t in range(len(x)):
                state = decay[t, head][:, None] * state
                error = v[t, head] - state.T @ k[t, head]
                state = state + beta[t, head] * np.outer(k[t, head], error)
                out[t, head] = state.T @ q[t, head] / np.sqrt(width)
        gate = sigmoid(self.linear(x, name + "g_proj")).reshape(out.shape)
        return self.linear((rms(out, self.get(name + "o_norm.weight")) * gate).reshape(len(x), -1), name + "o_proj")

    def mla(self, x, name):
        config, heads = self.config, self.config["num_attention_heads"]
        nope, rope, rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
        low = rms(self.linear(x, name + "q_a_proj"), self.get(name + "q_a_layernorm.weight"), 1e-6)
        q = self.linear(low, name + "q_b_proj").reshape(len(x), heads, nope + rope)
        both = self.linear(x, name + "kv_a_proj_with_mqa")
        latent = rms(both[:, :rank], self.get(name + "kv_a_layernorm.weight"), 1e-6)
        expanded = self.linear(latent, name + "kv_b_proj").reshape(len(x), heads, -1)
        out = np.zeros((len(x), heads, config["v_head_dim"]))
        for head in range(heads):
            key = np.concatenate([expanded[:, head, :nope], both[:, rank:]], 1)
            for t in range(len(x)):
                scores = key[: t + 1] @ q[t, head] * (nope + rope) ** -0.5
                weights = np.exp(scores - scores.max())
                out[t, head] = weights / weights.sum() @ expanded[: t + 1, head, nope:]
        return self.linear(out.reshape(len(x), -1) * sigmoid(self.linear(x, name + "g_proj")), name + "o_proj")

    def mlp(self, x, name):
        return self.linear(
            situ(self.linear(x, name + "gate_proj"), self.linear(x, name + "up_proj")), name + "down_proj"
        )

    def moe(self, x, name):
        scores = sigmoid(self.linear(x, name + "gate"))
        choice = scores + self.get(name + "gate.e_score_correction_bias")
        latent = self.linear(x, name + "routed_expert_down_proj")
        combined = np.zeros_like(latent)
        for t in range(len(x)):
            chosen = np.argsort(-choice[t])[: self.config["num_experts_per_token"]]
            weights = scores[t, chosen] / (scores[t, chosen].sum() + 1e-20) * self.config["routed_scaling_factor"]
            for weight, expert in zip(weights, chosen, strict=True):
                w1, w3, w2 = (f"{name}experts.{expert}.w{i}" for i in (1, 3, 2))
                y = situ(self.linear(latent[t], w1), self.linear(latent[t], w3))
                combined[t] += weight * self.linear(y, w2)
        combined = rms(combined, self.get(name + "routed_expert_norm.weight"))
        return self.linear(combined, name + "routed_expert_up_proj") + self.mlp(x, name + "shared_experts.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny K3 whose parameters are all heard, written in K3's format: `config.json` made nested by hand."""
    model = jax.jit(lambda: build_model(K3, rngs=nnx.Rngs(0)))()
    keys = iter(jax.random.split(jax.random.key(1), 200))
    model = jax.tree.map(lambda x: x + (0.3 if x.ndim < 3 else 0.05) * jax.random.normal(next(keys), x.shape), model)
    flat, nested = (tmp_path_factory.mktemp("k3") / name for name in ("flat", "nested"))
    save_pretrained(model, flat)  # as `kimi_linear`, under which the text model is published too
    values = json.loads((flat / "config.json").read_text())
    assert values["model_type"] == "kimi_linear" and values["attn_res_block_size"] == 2
    nested.mkdir()
    whole = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": values}
    (nested / "config.json").write_text(json.dumps(whole))
    held = {f"language_model.{name}": x for name, x in tensors(flat).items()}
    for name, x in held.items():
        if name.endswith("A_log"):
            held[name] = np.pad(x.reshape(-1), (0, 125))
    save_file(held | {"vision_tower.patch.weight": np.ones(3, np.float32)}, nested / "model.safetensors")
    return nested


def test_every_site_and_the_logits_equal_the_plain_reading(directory):
    """70 tokens: across the border of a chunk; seven layers in blocks of two, the last short."""
    sites, logits = Reading(directory)(TOKENS)
    model = load_pretrained(directory)
    assert model.config.depth == DepthConfig(rule="block", block_size=4)
    trace = jax.jit(unrolled)(model, jnp.asarray(TOKENS)[None])
    scanned = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(TOKENS)[None])
    differences = [
        np.linalg.norm(ours[0] - theirs) / np.linalg.norm(theirs)
        for ours, theirs in zip([*trace.inputs, trace.logits, scanned], [*sites, logits, logits], strict=True)
    ]
    print(f"largest relative difference: {max(differences):.1e}")
    assert max(differences) < 2e-5


def test_the_same_bytes_back(directory, tmp_path):
    """Padded decay rates too; the vision tower is not kept."""
    save_pretrained(load_pretrained(directory), tmp_path / "out", like=directory)
    text = {name: x for name, x in tensors(directory).items() if not name.startswith("vision")}
    assert same_bytes(tensors(tmp_path / "out"), text)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((directory / "config.json").read_text())


def test_what_makes_k3_another_model_is_heard(directory):
    """The reading and the model agree on the settings, so each setting has to change the logits."""
    model = load_pretrained(directory)
    run = jax.jit(lambda model: model(jnp.asarray(TOKENS)[None]))
    base = run(model)
    leaves = jax.tree.leaves(model)
    for changes in (
        {"activation": "silu"},
        {"kda": dataclasses.replace(model.config.kda, gate_lower_bound=-4.0)},
        {"moe": dataclasses.replace(model.config.moe, biased_weights=True)},
    ):
        other = jax.eval_shape(
            lambda changes=changes: build_model(dataclasses.replace(model.config, **changes), rngs=nnx.Rngs(0))
        )
        other = jax.tree.unflatten(jax.tree.structure(other), leaves)
        assert float(jnp.abs(run(other) - base).max()) > 1e-3, changes


NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def pack(x, exponents):
    """Codes of multiples of powers of two, two a byte, the first in the lower half."""
    scaled = x.reshape(len(x), -1, 32) / 2.0 ** exponents[..., None]
    codes = np.array([[[NUMBERS.index(abs(v)) + 8 * (v < 0) for v in group] for group in row] for row in scaled])
    codes = codes.reshape(len(x), -1).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).astype(np.uint8)


@pytest.fixture
def packed(directory, tmp_path):
    """(the directory with its experts in MXFP4, the same with the numbers that these say)."""
    draw, packed, plain = np.random.default_rng(1), tmp_path / "packed", tmp_path / "plain"
    held = tensors(directory)
    as_bytes, as_numbers = dict(held), dict(held)
    for name in [name for name in held if ".experts." in name]:
        rows, width = held[name].shape
        exponents = draw.integers(-6, -2, (rows, width // 32))
        codes = draw.choice(NUMBERS, (rows, width // 32, 32)) * draw.choice([-1, 1], (rows, width // 32, 32))
        numbers = (codes * 2.0 ** exponents[..., None]).reshape(rows, width).astype(np.float32)
        as_numbers[name] = numbers
        del as_bytes[name]
        as_bytes[name + "_packed"], as_bytes[name + "_scale"] = pack(numbers, exponents)
    for where, what in ((packed, as_bytes), (plain, as_numbers)):
        where.mkdir()
        (where / "config.json").write_text((directory / "config.json").read_text())
        save_file(what, where / "model.safetensors")
    return packed, plain


def test_mxfp4_experts_are_dequantised_as_they_are_read(packed):
    """Exactly, whole and in parts that begin and end anywhere."""
    model, expected = (load_pretrained(where, param_dtype="float32") for where in packed)
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, named_leaves(expected)[name], err_msg=name)
    left, right = (TensorStore(where) for where in packed)
    name = "language_model.model.layers.1.block_sparse_moe.experts.3.w1.weight"
    for part in ((slice(3, 9), slice(5, 50)), (slice(0, 32), slice(32, 64)), (slice(0, 1), slice(63, 64))):
        np.testing.assert_array_equal(left.read(name, part).astype(np.float32), right.read(name, part))


def test_mxfp4_experts_keep_their_bytes(packed, tmp_path):
    save_pretrained(load_pretrained(packed[0]), tmp_path / "out", like=packed[0], quantised=True)
    written, held = tensors(tmp_path / "out"), tensors(packed[0])
    assert same_bytes(written, {name: held[name] for name in written})  # the vision tower is not read
    assert [name for name in held if ".experts." in name] == [name for name in written if ".experts." in name]


def test_a_scale_that_does_not_fit_is_refused(packed):
    name = "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight"
    rewrite(packed[0], lambda held: held.update({name + "_scale": held[name + "_scale"][:-1]}))
    with pytest.raises(InteropError, match=r"w1\.weight_packed' is not MXFP4"):
        load_pretrained(packed[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_situ_beta": 3}, "activation_situ_beta=3 is not supported"),
        ({"linear_attn_config": {}}, r"linear_attn_config\.kda_layers is missing"),
        (
            {"linear_attn_config": {"kda_layers": [1], "full_attn_layers": [2]}},
            "must name each of the layers 1 to 7 once",
        ),
        ({"linear_attn_config": {"kda_layers": "all"}}, "must name each of the layers 1 to 7 once"),
        ({"linear_attn_config": 3}, "linear_attn_config=3 must be a group"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must name a kind for each of 7 layers: dense, sparse"),
        (
            {"first_k_dense_replace": "1"},
            "first_k_dense_replace='1' and moe_layer_freq=1 must be whole numbers of layers",
        ),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"mla_use_nope": False}, "mla_use_nope=False is not supported"),
    ],
)
def test_settings_that_are_not_k3s(directory, tmp_path, changes, message):
    values = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"text_config": values["text_config"] | changes}))
    with pytest.raises(InteropError, match=message):
        load_pretrained(tmp_path)
    values["text_config"]["linear_attn_config"]["head_dim"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InteropError, match=r"head_dim='wide' must be int"):
        load_pretrained(tmp_path)
    edit_config(tmp_path, text_config=None)
    with pytest.raises(InteropError, match="text_config is missing"):
        load_pretrained(tmp_path)
