"""Families and presets: published parameter counts, and settings that survive the way out and back."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, MLAConfig, ModelConfig, MoEConfig, RopeScalingConfig, load_config
from attnres_jax.errors import ConfigError
from attnres_jax.models import FAMILIES, PRESETS, Decoder, default_block_size, family_of, preset
from attnres_jax.models.family import differences

PUBLISHED = {  # of the model cards, in billions
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "moonlight-16b-a3b": 16.0,
    "deepseek-v3": 671,
    "kimi-linear-48b-a3b": 49.12,
    "kimi-k3": 2800,
    "llama-2-7b": 6.74,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 406,
}


def count(config):
    shapes = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset(name):
    config = preset(name)
    parameters = count(config)
    assert parameters == PRESETS[name].presets[name].parameters
    assert abs(parameters / PUBLISHED[name] / 1e9 - 1) < 0.01


@pytest.mark.parametrize("rule", ["block", "full", "mhc"])
def test_any_preset_takes_any_rule(rule):
    config = preset("qwen3-0.6b", residual=rule)
    assert config.depth == DepthConfig(rule=rule, block_size=8)
    assert count(config) > PRESETS["qwen3-0.6b"].presets["qwen3-0.6b"].parameters
    assert preset("qwen3-0.6b", "block", 6).depth.block_size == 6
    with pytest.raises(ConfigError, match=r"preset='qwen3-9b' is unknown; .*; nearest: 'qwen3-8b'"):
        preset("qwen3-9b")
    with pytest.raises(ConfigError, match=r"model\.depth.rule='blok' is unknown"):
        preset("qwen3-8b", "blok")


def test_about_eight_blocks():
    assert [default_block_size(layers) for layers in (1, 8, 9, 28, 93)] == [2, 2, 2, 8, 24]
    assert default_block_size(27) == 6  # nine blocks of three layers, as the paper has it


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_json_survives_the_way_out_and_back(name):
    family = PRESETS[name]
    for config in (preset(name, block_size=2), preset(name, "block")):
        read = family.read(family.write(config))
        assert not differences(read, config) and read.depth == config.depth and read.dtype == config.dtype
        expected = FAMILIES["kimi_linear"] if name == "kimi-k3" else family  # whose text model is one of those
        assert family_of(config) is expected


def test_settings_without_a_place_are_refused():
    model = ModelConfig(depth=DepthConfig(rule="residual", block_size=2))
    assert family_of(model).model_type == "qwen3"
    assert family_of(dataclasses.replace(model, qk_norm=False)).model_type == "llama"
    with pytest.raises(ConfigError, match=r"model\.qk_norm=False has no place in the qwen3 format"):
        FAMILIES["qwen3"].write(dataclasses.replace(model, qk_norm=False))
    for options in ({"weights": "sigmoid"}, {"key_norm": False}, {"heads": 2}, {"block_size": 1}):
        depth = DepthConfig(rule="block", **options)
        with pytest.raises(ConfigError, match=r"has no place in config\.json"):
            family_of(dataclasses.replace(model, depth=depth))


def test_a_run_of_a_config_file_has_a_family_however_it_is_run():
    config = load_config(str(Path(__file__).parents[2] / "configs/kimi_linear_48b.py"))
    assert family_of(config.model).model_type == "kimi_linear"
    capped = dataclasses.replace(config.model, expert_exchange="routed", expert_capacity=2.0)
    assert family_of(capped).model_type == "kimi_linear"


def test_the_nearest_family_names_what_it_has_no_place_for():
    """Its settings one by one, as they have to be; of other kinds of layers only where nothing has these."""

    def refused(**options):
        with pytest.raises(ConfigError) as error:
            family_of(ModelConfig(**options))
        return str(error.value)

    assert refused(mlp_layers="moe", moe=MoEConfig(num_shared=0, correction_bias=False)) == (
        "model.moe.router_activation='sigmoid' has no place in the qwen3_moe format, "
        "which needs model.moe.router_activation='softmax'"
    )
    assert refused(mlp_layers="moe").startswith(
        "model.moe.num_shared=1, model.moe.router_activation='sigmoid', model.moe.correction_bias=True have no place"
    )
    assert refused(attention_layers="kda*3,mla", mla=MLAConfig(latent_eps=1e-3)) == (
        "model.mla.latent_eps=0.001 has no place in the kimi_linear format, which needs model.mla.latent_eps=1e-06"
    )
    assert refused(attention_layers="kda,gqa").startswith("model.attention_layers='kda,gqa")


@pytest.mark.parametrize(
    "options, family",
    [
        ({"moe": MoEConfig(num_groups=4, top_groups=4), "mlp_layers": "moe", "attention_layers": "mla"}, "kimi_linear"),
        ({"moe": MoEConfig(latent_norm=False), "mla": MLAConfig(rotary=True)}, "deepseek_v3"),
        ({"mla": MLAConfig(rotary_interleaved=True)}, "kimi_linear"),
    ],
)
def test_settings_that_no_layer_reads_need_no_place(options, family):
    config = ModelConfig(**{"attention_layers": "mla", "mlp_layers": "moe"} | options)
    default = dataclasses.replace(config, moe=MoEConfig(), mla=MLAConfig(rotary=config.mla.rotary))
    assert family_of(config) is FAMILIES[family] and not differences(config, default)


def test_rotary_settings_under_old_and_new_names():
    family, base = FAMILIES["llama"], FAMILIES["llama"].write(preset("llama-3.1-8b"))
    scaling = RopeScalingConfig(kind="llama3", factor=8.0, original_length=8192)
    assert family.read(base).rope_scaling == scaling
    old = {key: value for key, value in base.items() if not key.startswith("rope")}
    assert family.read(old).rope_theta == 10_000.0
    new = old | {"rope_parameters": base["rope_scaling"] | {"rope_theta": base["rope_theta"]}}
    assert family.read(new) == family.read(base)
    with pytest.raises(ConfigError, match="layer_types"):
        qwen3 = FAMILIES["qwen3"].write(preset("qwen3-0.6b"))
        FAMILIES["qwen3"].read(qwen3 | {"layer_types": ["sliding_attention"]})
