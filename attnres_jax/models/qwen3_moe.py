"""Qwen3, the sizes with experts (Qwen, 2025): as the dense ones, softmax routing without shared experts."""

from collections.abc import Mapping
from typing import Any

from attnres_jax.config import ModelConfig, mlp_kinds
from attnres_jax.errors import ConfigError
from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset
from attnres_jax.models.qwen3 import refuse_windows
from attnres_jax.pattern import shorten


def _size(name: str, parameters: int, /, **settings: Any) -> Preset:
    common = {
        "vocab_size": 151936,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "dtype": "bfloat16",
    }
    return Preset(f"Qwen/{name}", parameters, common | settings)


PRESETS = {
    "qwen3-30b-a3b": _size(
        "Qwen3-30B-A3B",
        30_532_122_624,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        intermediate_size=6144,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _size(
        "Qwen3-235B-A22B",
        235_093_634_560,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        intermediate_size=12288,
        moe_intermediate_size=1536,
    ),
}


def _read_layers(values: Mapping[str, Any]) -> dict[str, Any]:
    refuse_windows(values)
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise ConfigError(f"decoder_sparse_step={step!r} must be a positive number of layers")
    layers = range(values["num_hidden_layers"])
    kinds = ["moe" if (layer + 1) % step == 0 and layer not in dense else "swiglu" for layer in layers]
    return {"mlp_layers": shorten(kinds)}


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, kind in enumerate(mlp_kinds(config)) if kind == "swiglu"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *DECODER_KEYS,
        Key("head_dim", "head_dim", 128),
        Key("max_length", "max_position_embeddings", 32768),
        Key("moe.num_experts", "num_experts", lambda values: values.get("num_local_experts")),
        Key("moe.experts_per_token", "num_experts_per_tok", 8),
        Key("moe.expert_width", "moe_intermediate_size"),
        Key("moe.renormalise", "norm_topk_prob", False),
    ),
    constants={
        "qk_norm": True,
        "attention_layers": "gqa",
        "moe.num_shared": 0,
        "moe.router_activation": "softmax",
        "moe.correction_bias": False,
    },
    expected={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
    },
    presets=PRESETS,
    read_more=_read_layers,
    write_more=_write_layers,
)
