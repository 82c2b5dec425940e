"""Analytic FLOPs against a count by hand and against the compiler's."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, KDAConfig, MLAConfig, ModelConfig, MoEConfig
from attnres_jax.depth import RULES, make_rule
from attnres_jax.models import Decoder, unrolled
from attnres_jax.training import forward_flops_per_token, training_flops_per_token
from attnres_jax.training.flops import PEAK_FLOPS


def test_hand_count():
    """Width 4, 2 heads of 6 over 1 key-value head, MLP 10, 32 tokens of 8, one layer, no depth mixing."""
    model = ModelConfig(
        vocab_size=32,
        width=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        mlp_width=10,
        depth=DepthConfig(rule="residual"),
    )
    query, key, value, out = 2 * 4 * 12, 2 * 4 * 6, 2 * 4 * 6, 2 * 12 * 4
    scores, mix = 2 * 12 * 8, 2 * 12 * 8
    gate, up, down, head = 2 * 4 * 10, 2 * 4 * 10, 2 * 10 * 4, 2 * 4 * 32
    forward = query + key + value + out + scores + mix + gate + up + down + head
    assert forward_flops_per_token(model, 8) == forward
    assert training_flops_per_token(model, 8) == 3 * forward


@pytest.mark.parametrize(
    ("rule", "size", "reads"),
    [
        ("residual", 2, 0),
        ("full", 2, 1 + 2 + 3 + 4 + 5 + 6 + 7),
        ("block", 1, 1 + 2 + 3 + 4 + 5 + 6 + 7),
        ("block", 2, 1 + 2 + 2 + 3 + 3 + 4 + 4),
        ("block", 4, 1 + 2 + 2 + 2 + 2 + 3 + 3),  # the last block is short; the readout reads it with the rest
        ("block", 6, 1 + 2 + 2 + 2 + 2 + 2 + 2),
    ],
)
def test_sources_read_over_six_sublayers(rule, size, reads):
    assert make_rule(rule, size, 1e-6).flops(6, 10) == 2 * 2 * 10 * reads


def compared(num_layers, depth, **more):
    """The analytic count over the compiler's."""
    sizes = {"vocab_size": 512, "width": 128, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 384}
    model = ModelConfig(**sizes, num_layers=num_layers, depth=depth, **more)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    shapes = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    program = jax.jit(lambda decoder, tokens: unrolled(decoder, tokens).logits).lower(shapes, tokens).compile()
    return forward_flops_per_token(model, 64) / (program.cost_analysis()["flops"] / (2 * 64))


OPTIONS = [{"query": "none"}, {"query": "input"}, {"window": 1}, {"heads": 4}, {"key_norm": False}]


@pytest.mark.parametrize(
    "depth",
    [DepthConfig(rule=rule, block_size=2) for rule in RULES]
    + [DepthConfig(rule="block", block_size=4)]
    + [DepthConfig(rule="block", block_size=2, **option) for option in OPTIONS],
    ids=lambda depth: "-".join(map(str, dataclasses.astuple(depth)[:2])),
)
def test_within_three_percent_of_the_compilers_count(depth):
    """The compiler counts elementwise work too, so it counts a little more."""
    assert 0.97 < compared(3, depth) < 1


@pytest.mark.parametrize(
    "kinds",
    [
        {"attention_layers": "mla"},
        {"attention_layers": "mla", "mla": MLAConfig(query_rank=48, output_gate=True)},
        {
            "mlp_layers": "moe",
            "experts": "dense",  # which computes all, and all are chosen
            "moe": MoEConfig(num_experts=3, experts_per_token=3, expert_width=96, latent_width=64),
        },
    ],
    ids=["mla", "mla_low_rank", "moe"],
)
def test_kinds_are_within_three_percent_too(kinds):
    assert 0.97 < compared(1, DepthConfig(rule="residual"), **kinds) < 1


def test_hand_count_of_delta_attention():
    """Width 4, 2 heads of 6, each chunk of 64 tokens (arXiv:2510.26692): the compiler counts a loop once."""
    sizes = {"vocab_size": 32, "width": 4, "num_layers": 1, "num_heads": 2, "mlp_width": 10}
    none = ModelConfig(**sizes, attention_layers="kda", kda=KDAConfig(head_dim=6), depth=DepthConfig(rule="residual"))
    query_key_value_out, beta = 4 * 2 * 4 * 12, 2 * 4 * 2
    low_rank = 2 * (4 * 6 + 6 * 12)
    rule = 2 * (6 * 6**2 + 3 * 64 * 6 + 64**2)
    mlp_and_head = 3 * 2 * 4 * 10 + 2 * 4 * 32
    assert forward_flops_per_token(none, 8) == query_key_value_out + beta + 2 * low_rank + rule + mlp_and_head
    full = dataclasses.replace(none, kda=KDAConfig(head_dim=6, full_rank_gate=True))
    assert forward_flops_per_token(full, 8) - forward_flops_per_token(none, 8) == 2 * 4 * 12 - low_rank


def test_peaks_are_found_by_the_first_part_of_the_kind_that_matches():
    """`NVIDIA H100 PCIe` must not be taken for an SXM board, nor `TPU v5 lite` for a v5p."""
    kinds = list(PEAK_FLOPS)
    for index, kind in enumerate(kinds):
        assert not any(earlier in kind for earlier in kinds[:index])
