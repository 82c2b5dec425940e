"""Qwen3, the dense sizes (Qwen, 2025): grouped-query attention with q/k norm and heads of 128, SwiGLU."""

from collections.abc import Mapping
from typing import Any

from attnres_jax.errors import ConfigError
from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset


def size(name: str, parameters: int, /, **settings: Any) -> Preset:
    """A released size: the settings that it has beside those of all sizes, or in their place."""
    common = {
        "vocab_size": 151936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "dtype": "bfloat16",
    }
    return Preset(f"Qwen/{name}", parameters, common | settings)


# Parameters of the tied sizes are counted once; the hub lists the embedding of 0.6B and 1.7B twice.
PRESETS = {
    "qwen3-0.6b": size(
        "Qwen3-0.6B",
        596_049_920,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": size(
        "Qwen3-1.7B",
        1_720_574_976,
        hidden_size=2048,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=6144,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": size(
        "Qwen3-4B",
        4_022_468_096,
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        intermediate_size=9728,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": size(
        "Qwen3-8B",
        8_190_735_360,
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        intermediate_size=12288,
    ),
    "qwen3-14b": size(
        "Qwen3-14B",
        14_768_307_200,
        hidden_size=5120,
        num_hidden_layers=40,
        num_attention_heads=40,
        intermediate_size=17408,
    ),
    "qwen3-32b": size(
        "Qwen3-32B",
        32_762_123_264,
        hidden_size=5120,
        num_hidden_layers=64,
        num_attention_heads=64,
        intermediate_size=25600,
    ),
}


def refuse_windows(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding-window attention is not supported; no further settings."""
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r} is not supported; supported: full_attention everywhere")
    return {}


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(*DECODER_KEYS, Key("head_dim", "head_dim", 128), Key("max_length", "max_position_embeddings", 32768)),
    constants={"qk_norm": True},
    expected={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
    },
    presets=PRESETS,
    read_more=refuse_windows,
)
