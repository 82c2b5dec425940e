"""Kimi K3 (Moonshot AI, arXiv 2607.24653), the text backbone: what Kimi Linear became, with Block AttnRes.

The settings of the text model lie in `text_config`; the vision tower is not read. The weights come under the Kimi K3
License (https://huggingface.co/moonshotai/Kimi-K3), which is not this package's. The published experts are MXFP4:
they are dequantised as they are read, and written as what the parameters are or, if asked for, in MXFP4 again.
"""

import dataclasses

from attnres_jax.models.family import Preset
from attnres_jax.models.kimi_linear import KIMI_LINEAR, layer_lists

PRESETS = {
    # The report does not give the scaling of the experts' weights; 1 is what public readers of the release have.
    "kimi-k3": Preset(
        "moonshotai/Kimi-K3",
        2_779_481_795_168,
        {
            "text_config": {
                "vocab_size": 163840,
                "hidden_size": 7168,
                "num_hidden_layers": 93,
                "num_attention_heads": 96,
                "num_key_value_heads": 96,
                "intermediate_size": 33792,
                "moe_intermediate_size": 3072,
                "num_experts": 896,
                "num_experts_per_token": 16,
                "num_shared_experts": 2,
                "routed_scaling_factor": 1.0,
                "first_k_dense_replace": 1,
                "routed_expert_hidden_size": 3584,
                "latent_moe_use_norm": True,
                "hidden_act": "situ",
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "mla_use_output_gate": True,
                "rms_norm_eps": 1e-5,
                "model_max_length": 1048576,
                "attn_res_block_size": 12,
                "linear_attn_config": {
                    "head_dim": 128,
                    "num_heads": 96,
                    "short_conv_kernel_size": 4,
                    "gate_lower_bound": -5.0,
                    "use_full_rank_gate": True,
                    **layer_lists(93),
                },
                "dtype": "bfloat16",
            }
        },
    ),
}

KIMI_K3 = dataclasses.replace(
    KIMI_LINEAR,
    model_type="kimi_k3",
    architecture="KimiK3ForConditionalGeneration",
    nested=("text_config", "kimi_linear"),
    presets=PRESETS,
)
