"""DeepSeek-V3 (DeepSeek-AI, 2024) and Moonlight (Moonshot AI, 2025): latent attention with rotation, sigmoid routing.

The layers of multi-token prediction that DeepSeek-V3 has behind the last one are not read. Its released weights are
8-bit floats with a scale for each tile, which `interop` multiplies out as it reads them.
"""

from collections.abc import Mapping
from typing import Any

from attnres_jax.config import ModelConfig, mlp_kinds
from attnres_jax.errors import ConfigError
from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset
from attnres_jax.pattern import shorten

PRESETS = {
    "moonlight-16b-a3b": Preset(
        "moonshotai/Moonlight-16B-A3B",
        15_960_110_208,
        {
            "vocab_size": 163840,
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 11264,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50_000.0,
            "dtype": "bfloat16",
        },
    ),
    "deepseek-v3": Preset(
        "deepseek-ai/DeepSeek-V3",
        671_026_419_200,
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "dtype": "bfloat16",
        },
    ),
}

MLA_KEYS = (
    Key("mla.latent_dim", "kv_lora_rank", 512),
    Key("mla.nope_dim", "qk_nope_head_dim", 128),
    Key("mla.rope_dim", "qk_rope_head_dim", 64),
    Key("mla.value_dim", "v_head_dim", 128),
    Key("mla.query_rank", "q_lora_rank", 0, null=0),
)
"""What latent attention is called in every config of the family and its descendants."""


def dense_first(values: Mapping[str, Any]) -> dict[str, Any]:
    """The pattern of feed-forward layers: the first few are dense, and later every so many have experts."""
    first, step = values.get("first_k_dense_replace", 0), values.get("moe_layer_freq", 1)
    if type(first) is not int or type(step) is not int or first < 0 or step < 1:
        raise ConfigError(
            f"first_k_dense_replace={first!r} and moe_layer_freq={step!r} must be whole numbers of layers"
        )
    layers = range(values["num_hidden_layers"])
    return {"mlp_layers": shorten(["moe" if n >= first and n % step == 0 else "swiglu" for n in layers])}


def write_dense_first(config: ModelConfig) -> dict[str, Any]:
    """The inverse, for dense layers that all come first."""
    kinds = mlp_kinds(config)
    return {"first_k_dense_replace": kinds.index("moe") if "moe" in kinds else len(kinds), "moe_layer_freq": 1}


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *DECODER_KEYS,
        *MLA_KEYS,
        Key("mla.rotary_interleaved", "rope_interleave", True),
        Key("max_length", "max_position_embeddings", 4096),
        Key("moe.num_experts", "n_routed_experts", lambda values: values.get("num_local_experts")),
        Key("moe.experts_per_token", "num_experts_per_tok"),
        Key("moe.expert_width", "moe_intermediate_size"),
        Key("moe.num_shared", "n_shared_experts", 0),
        Key("moe.renormalise", "norm_topk_prob", True),
        Key("moe.scaling", "routed_scaling_factor", 1.0),
        Key("moe.num_groups", "n_group", 1),
        Key("moe.top_groups", "topk_group", 1),
    ),
    constants={"attention_layers": "mla", "mla.rotary": True},
    expected={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    presets=PRESETS,
    read_more=dense_first,
    write_more=write_dense_first,
)
