"""Analytic cost: floating-point operations per token, and the share of the device's peak that a run reaches.

Only matrix products are counted, a multiply-add as two, and the backward pass as twice the forward. Attention counts
the full T x T square although half of it is masked: the usual convention, and what a plain kernel computes. Work
repeated by rematerialisation is not counted: the figure is the model's, not the schedule's. Kimi Delta Attention counts
as its report has it, chunks of 64 tokens. Of the experts those are counted that a token takes.
"""

from collections.abc import Sequence

import jax

from attnres_jax.config import ModelConfig, attention_kinds, head_dim, kda_heads, mlp_kinds
from attnres_jax.depth import make_rule

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 operations per second by part of JAX's `device_kind`, the first match counting, as published by Google
and NVIDIA. A TPU v4, v5p or v6e chip is one JAX device; a TPU7x chip is two, hence the half."""


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Operations of one training step per token at this sequence length: forward, and twice that backward."""
    return 3 * forward_flops_per_token(model, sequence_length)


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Operations of the forward pass per token."""
    kinds = [*attention_kinds(model), *mlp_kinds(model)]
    sublayers = sum(FLOPS[kind](model, sequence_length) for kind in kinds)
    rule = make_rule(model.depth.rule, model.depth.block_size, model.norm_eps, model.depth)
    depth = rule.flops(2 * model.num_layers, model.width)
    return sublayers + 2 * model.width * model.vocab_size + depth


def _gqa(model: ModelConfig, sequence_length: int) -> int:
    width = head_dim(model)
    projections = 2 * model.width * width * 2 * (model.num_heads + model.num_kv_heads)  # query, output; key, value
    return projections + 2 * 2 * model.num_heads * width * sequence_length


def _mla(model: ModelConfig, sequence_length: int) -> int:
    mla, heads, width = model.mla, model.num_heads, model.width
    key_dim, rank = mla.nope_dim + mla.rope_dim, mla.query_rank
    query = rank * (width + heads * key_dim) if rank else width * heads * key_dim
    latent = width * (mla.latent_dim + mla.rope_dim) + mla.latent_dim * heads * (mla.nope_dim + mla.value_dim)
    out = width * heads * mla.value_dim * (2 if mla.output_gate else 1)
    return 2 * (query + latent + out) + 2 * heads * (key_dim + mla.value_dim) * sequence_length


def _kda(model: ModelConfig, sequence_length: int) -> int:
    del sequence_length
    kda, chunk = model.kda, 64
    heads, head_dim = kda_heads(model), kda.head_dim
    channels = heads * head_dim
    low_rank = head_dim * (model.width + channels)  # of the decay, and of the gate if that is one
    gate = model.width * channels if kda.full_rank_gate else low_rank
    projections = 4 * model.width * channels + low_rank + gate + model.width * heads  # query, key, value, output; beta
    rule = 6 * head_dim**2 + 3 * chunk * head_dim + chunk**2  # arXiv 2510.26692
    return 2 * projections + heads * rule


def _swiglu(model: ModelConfig, sequence_length: int) -> int:
    del sequence_length
    return 3 * 2 * model.width * model.mlp_width  # gate, up, down


def _moe(model: ModelConfig, sequence_length: int) -> int:
    del sequence_length
    moe, width = model.moe, model.width
    inner = moe.latent_width or width
    routed = moe.experts_per_token * 3 * inner * moe.expert_width
    shared = 3 * width * moe.all_shared_width
    latent = 2 * width * inner if moe.latent_width else 0
    return 2 * (width * moe.num_experts + routed + shared + latent)


FLOPS = {"gqa": _gqa, "mla": _mla, "kda": _kda, "swiglu": _swiglu, "moe": _moe}
"""Operations per token of each kind of sublayer, from the model and the length of a sequence."""


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """The devices' dense bfloat16 peak together, in operations per second; None where it is not in the table."""
    peak = next((peak for kind, peak in PEAK_FLOPS.items() if kind in devices[0].device_kind), None)
    return peak and peak * len(devices)
