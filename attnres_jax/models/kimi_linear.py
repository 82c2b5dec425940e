"""Kimi Linear (Moonshot AI, arXiv 2510.26692): KDA and latent attention without rotation, three to one, and experts.

Kimi K3's text backbone is published under the same `model_type`: the bounded decay, the full-rank output gate, gated
latent attention, LatentMoE and SiTU are settings that Kimi Linear leaves alone. Whether released weights were trained
with the score correction in the experts' weights is not known; it is not, here, unless `config.json` says
`router_weight_uses_score_correction_bias`.
"""

from collections.abc import Mapping
from typing import Any

from attnres_jax.config import ModelConfig, attention_kinds
from attnres_jax.errors import ConfigError
from attnres_jax.models.deepseek_v3 import MLA_KEYS, dense_first, write_dense_first
from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset
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


def _read_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """From `linear_attn_config`, or from the lists of kinds that transformers writes instead."""
    linear = values.get("linear_attn_config") or {}
    layers = range(1, values["num_hidden_layers"] + 1)
    if "kda_layers" in linear:
        kda, full = linear["kda_layers"], linear.get("full_attn_layers", [])
        if sorted([*kda, *full]) != list(layers):
            raise ConfigError(
                f"linear_attn_config: kda_layers and full_attn_layers must name each of the layers 1 to {len(layers)} "
                "once"
            )
        kinds = ["kda" if layer in kda else "mla" for layer in layers]
    else:
        types = values.get("layer_types")
        names = {"linear_attention": "kda", "full_attention": "mla"}
        if not isinstance(types, list) or len(types) != len(layers) or not set(types) <= set(names):
            raise ConfigError("linear_attn_config.kda_layers is missing")
        kinds = [names[kind] for kind in types]
    experts = dense_first(values)
    mlps = values.get("mlp_layer_types")
    if mlps is not None:
        experts = {"mlp_layers": shorten(["moe" if kind == "sparse" else "swiglu" for kind in mlps])}
    bound = linear.get("gate_lower_bound", values.get("gate_lower_bound"))
    return experts | {
        "attention_layers": shorten(kinds),
        "kda.head_dim": linear.get("head_dim", values.get("linear_head_dim", 128)),
        "kda.num_heads": linear.get("num_heads", values.get("linear_num_heads", 0)),
        "kda.conv_size": linear.get("short_conv_kernel_size", values.get("linear_conv_kernel_dim", 4)),
        "kda.gate_lower_bound": float(bound or 0.0),
        "kda.full_rank_gate": bool(linear.get("use_full_rank_gate", values.get("use_full_rank_gate", False))),
    }


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    kinds, kda = attention_kinds(config), config.kda
    lists = {
        name: [layer + 1 for layer, found in enumerate(kinds) if found == kind]
        for name, kind in (("full_attn_layers", "mla"), ("kda_layers", "kda"))
    }
    linear = {
        "head_dim": kda.head_dim,
        "num_heads": kda.num_heads or config.num_heads,
        "short_conv_kernel_size": kda.conv_size,
        **lists,
    }
    if kda.gate_lower_bound:
        linear["gate_lower_bound"] = kda.gate_lower_bound
    if kda.full_rank_gate:
        linear["use_full_rank_gate"] = True
    biased = {"router_weight_uses_score_correction_bias": True} if config.moe.biased_weights else {}
    return {"linear_attn_config": linear} | write_dense_first(config) | biased


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    keys=(
        *DECODER_KEYS,
        *MLA_KEYS,
        Key("mla.output_gate", "mla_use_output_gate", False),
        Key("activation", "hidden_act", "silu"),
        Key("max_length", "model_max_length", 1048576),
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
        Key("moe.biased_weights", "router_weight_uses_score_correction_bias", False, null=False),
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
