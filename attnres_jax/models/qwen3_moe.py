"""Qwen3, the sizes with experts (Qwen, 2025): as the dense ones, softmax routing without shared experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from attnres_jax.config import ModelConfig, mlp_kinds
from attnres_jax.errors import ConfigError
from attnres_jax.models.family import Key, Preset
from attnres_jax.models.qwen3 import QWEN3, refuse_windows, size
from attnres_jax.pattern import shorten


def _size(name: str, parameters: int, /, **settings: Any) -> Preset:
    experts = {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return size(name, parameters, **experts | settings)


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
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers={dense!r} must be a list of layers")
    layers = range(values["num_hidden_layers"])
    kinds = ["moe" if (layer + 1) % step == 0 and layer not in dense else "swiglu" for layer in layers]
    return {"mlp_layers": shorten(kinds)}


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, kind in enumerate(mlp_kinds(config)) if kind == "swiglu"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *QWEN3.keys,
        Key("moe.num_experts", "num_experts", lambda values: values.get("num_local_experts")),
        Key("moe.experts_per_token", "num_experts_per_tok", 8),
        Key("moe.expert_width", "moe_intermediate_size"),
        Key("moe.renormalise", "norm_topk_prob", False),
    ),
    constants=QWEN3.constants | {"moe.num_shared": 0, "moe.router_activation": "softmax", "moe.correction_bias": False},
    presets=PRESETS,
    read_more=_read_layers,
    write_more=_write_layers,
)
