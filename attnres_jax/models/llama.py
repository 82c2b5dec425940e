"""Llama 2 to 3.3 (Meta): grouped-query attention without q/k norm, SwiGLU, and from 3.1 on `llama3` rotary scaling."""

from typing import Any

from attnres_jax.models.family import DECODER_KEYS, Family, Key, Preset


def _llama3(repository: str, parameters: int, factor: float, /, **settings: Any) -> Preset:
    """A size of Llama 3.1 or 3.2."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    common = {
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": scaling,
        "dtype": "bfloat16",
    }
    return Preset(f"meta-llama/{repository}", parameters, common | settings)


PRESETS = {
    "llama-2-7b": Preset(
        "meta-llama/Llama-2-7b-hf",
        6_738_415_616,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        },
    ),
    "llama-3.2-1b": _llama3(
        "Llama-3.2-1B",
        1_235_814_400,
        32.0,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _llama3(
        "Llama-3.2-3B",
        3_212_749_824,
        32.0,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama3(
        "Llama-3.1-8B",
        8_030_261_248,
        8.0,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
    ),
    "llama-3.1-70b": _llama3(
        "Llama-3.1-70B",
        70_553_706_496,
        8.0,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        intermediate_size=28672,
    ),
    "llama-3.1-405b": _llama3(
        "Llama-3.1-405B",
        405_853_388_800,
        8.0,
        hidden_size=16384,
        num_hidden_layers=126,
        num_attention_heads=128,
        intermediate_size=53248,
    ),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(*DECODER_KEYS, Key("head_dim", "head_dim", 0), Key("max_length", "max_position_embeddings", 2048)),
    constants={"qk_norm": False},
    expected={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
    presets=PRESETS,
)
