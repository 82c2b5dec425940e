"""Kimi Linear (Moonshot AI, arXiv 2510.26692): KDA and latent attention without rotation, three to one, and experts.

Kimi K3's text backbone is published under the same `model_type`: the bounded decay, the full-rank output gate, gated
latent attention, LatentMoE and SiTU are settings that Kimi Linear leaves alone. Whether released weights were trained
with the score correction in the experts' weights is not known; it is not, here, unless `config.json` says
`router_weight_uses_score_correction_bias`.
"""

from collections.abc import Mapping
from typing import Any

from attnres_jax.config import ModelConfig, attention_kinds, kda_heads
from attnres_jax.errors import ConfigError
from attnres_jax.models.deepseek_v3 import MLA_KEYS, dense_first, write_dense_first
from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset, read_key
from attnres_jax.pattern import shorten


def layer_lists(num_layers: int) -> dict[str, list[int]]:
    """The two lists of `linear_attn_config`, counted from 1: every fourth layer and the last are full attention."""
    full = [layer for layer in range(1, num_layers + 1) if layer % 4 == 0 or layer == num_layers]
    return {"full_attn_layers": full, "kda_layers": [n for n in range(1, num_layers + 1) if n not in full]}


PRESETS = {
    "kimi-linear-48b-a3b": Preset(
        "moonshotai/Kimi-Linear-48B-A3B-Base",
        49_122_681_728,
        {
            "vocab_size": 163840,
            "hidden_size": 2304,
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
            "num_experts": 256,
            "num_experts_per_token": 8,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.446,
            "rms_norm_eps": 1e-5,
            "model_max_length": 1048576,
            "linear_attn_config": {
                "head_dim": 128,
                "num_heads": 32,
                "short_conv_kernel_size": 4,
                **layer_lists(27),
            },
            "dtype": "bfloat16",
        },
    ),
}


LINEAR_KEYS = (
    Key("kda.head_dim", "head_dim", 128),
    Key("kda.num_heads", "num_heads", 0),
    Key("kda.conv_size", "short_conv_kernel_size", 4),
    Key("kda.gate_lower_bound", "gate_lower_bound", 0.0),
    Key("kda.full_rank_gate", "use_full_rank_gate", False),
)
"""Of `linear_attn_config`."""

BIASED = Key("moe.biased_weights", "router_weight_uses_score_correction_bias", False)
"""NeMo's name; written only where it is true."""

FLAT = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""What transformers calls some of them outside of it."""


def _read_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """From `linear_attn_config`, or from the lists of kinds that transformers writes instead."""
    linear = values.get("linear_attn_config") or {}
    if not isinstance(linear, Mapping):
        raise ConfigError(f"linear_attn_config={linear!r} must be a group of settings")
    count = values["num_hidden_layers"]
    if "kda_layers" in linear:
        kda, full = linear["kda_layers"], linear.get("full_attn_layers", [])
        named = [*kda, *full] if isinstance(kda, list) and isinstance(full, list) else [None]
        if any(type(layer) is not int for layer in named) or sorted(named) != list(range(1, count + 1)):
            raise ConfigError(
                f"linear_attn_config: kda_layers and full_attn_layers must name each of the layers 1 to {count} once"
            )
        kinds = ["kda" if layer in kda else "mla" for layer in range(1, count + 1)]
    elif values.get("layer_types") is not None:
        kinds = _kinds(values, "layer_types", {"linear_attention": "kda", "full_attention": "mla"})
    else:
        raise ConfigError("linear_attn_config.kda_layers is missing")
    mlps = dense_first(values)
    if values.get("mlp_layer_types") is not None:
        mlps = {"mlp_layers": shorten(_kinds(values, "mlp_layer_types", {"dense": "swiglu", "sparse": "moe"}))}
    given = {name: values.get(FLAT.get(name, name)) for name in (key.theirs for key in LINEAR_KEYS)}
    kda_settings = {key.ours: read_key(key, given | dict(linear)) for key in LINEAR_KEYS}
    biased = {BIASED.ours: read_key(BIASED, values)}
    return mlps | kda_settings | biased | {"attention_layers": shorten(kinds)}


def _kinds(values: Mapping[str, Any], name: str, ours: Mapping[str, str]) -> list[str]:
    """A list with a kind for every layer."""
    theirs, count = values[name], values["num_hidden_layers"]
    if not isinstance(theirs, list) or len(theirs) != count or any(kind not in [*ours] for kind in theirs):
        raise ConfigError(f"{name} must name a kind for each of {count} layers: {', '.join(ours)}")
    return [ours[kind] for kind in theirs]


SPECIAL = {"bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839}
"""What transformers takes where a `config.json` has none; beyond the vocabulary of a smaller model it cannot load."""


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    kinds, kda = attention_kinds(config), config.kda
    lists = {
        name: [layer + 1 for layer, found in enumerate(kinds) if found == kind]
        for name, kind in (("full_attn_layers", "mla"), ("kda_layers", "kda"))
    }
    linear = {
        "head_dim": kda.head_dim,
        "num_heads": kda_heads(config),
        "short_conv_kernel_size": kda.conv_size,
        **lists,
    }
    if kda.gate_lower_bound:
        linear["gate_lower_bound"] = kda.gate_lower_bound
    if kda.full_rank_gate:
        linear["use_full_rank_gate"] = True
    biased = {BIASED.theirs: True} if config.moe.biased_weights else {}
    outside = {name: None for name, index in SPECIAL.items() if index >= config.vocab_size}
    return {"linear_attn_config": linear} | write_dense_first(config) | biased | outside


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    keys=(
        *DECODER_KEYS,
        *MLA_KEYS,
        Key("mla.output_gate", "mla_use_output_gate", False),
        Key("activation", "hidden_act", "silu"),
        Key("max_length", "model_max_length", lambda values: values.get("max_position_embeddings", 1048576)),
        Key("moe.num_experts", "num_experts", lambda values: values.get("num_local_experts")),
        Key("moe.experts_per_token", "num_experts_per_token"),
        Key("moe.expert_width", "moe_intermediate_size"),
        Key("moe.num_shared", "num_shared_experts", 0),
        Key("moe.renormalise", "moe_renormalize", True),
        Key("moe.router_activation", "moe_router_activation_func", "sigmoid"),
        Key("moe.scaling", "routed_scaling_factor", 1.0),
        Key("moe.num_groups", "num_expert_group", 1),
        Key("moe.top_groups", "topk_group", 1),
        Key("moe.latent_width", "routed_expert_hidden_size", 0, null=0),
        Key("moe.latent_norm", "latent_moe_use_norm", True),
    ),
    constants={},
    expected={
        "mla_use_nope": (True,),
        "activation_situ_beta": (4, 4.0),
        "activation_situ_linear_beta": (25, 25.0),
    },
    presets=PRESETS,
    read_more=_read_layers,
    write_more=_write_layers,
)
