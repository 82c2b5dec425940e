"""Analytic cost: floating-point operations per token, and the share of the device's peak that a run reaches.

Only matrix products are counted, a multiply-add as two, and the backward pass as twice the forward. Attention counts
the full T x T square although half of it is masked: the usual convention, and what a plain kernel computes. Work
repeated by rematerialisation is not counted: the figure is the model's, not the schedule's.
"""

from collections.abc import Sequence

import jax

from attnres_jax.config import ModelConfig
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
    head_dim = model.head_dim or model.width // model.num_heads
    projections = 2 * model.width * head_dim * 2 * (model.num_heads + model.num_kv_heads)  # query, output; key, value
    scores_and_mix = 2 * 2 * model.num_heads * head_dim * sequence_length
    mlp = 3 * 2 * model.width * model.mlp_width  # gate, up, down
    head = 2 * model.width * model.vocab_size
    rule = make_rule(model.depth.rule, model.depth.block_size, model.norm_eps, model.depth)
    depth = rule.flops(2 * model.num_layers, model.width)
    return model.num_layers * (projections + scores_and_mix + mlp) + head + depth


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """The devices' dense bfloat16 peak together, in operations per second; None where it is not in the table."""
    peak = next((peak for kind, peak in PEAK_FLOPS.items() if kind in devices[0].device_kind), None)
    return peak and peak * len(devices)
