"""Analytic FLOPs against a count by hand and against the compiler's."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, ModelConfig
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


@pytest.mark.parametrize(("rule", "size"), [(rule, 2) for rule in RULES] + [("block", 4)])
def test_within_three_percent_of_the_compilers_count(rule, size):
    """The compiler counts elementwise work too, so it counts a little more."""
    model = ModelConfig(
        vocab_size=512,
        width=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=384,
        depth=DepthConfig(rule=rule, block_size=size),
    )
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    shapes = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    program = jax.jit(lambda decoder, tokens: unrolled(decoder, tokens).logits).lower(shapes, tokens).compile()
    counted = program.cost_analysis()["flops"] / (2 * 64)
    assert 0.97 < forward_flops_per_token(model, 64) / counted < 1


def test_peaks_are_found_by_the_first_part_of_the_kind_that_matches():
    """`NVIDIA H100 PCIe` must not be taken for an SXM board, nor `TPU v5 lite` for a v5p."""
    kinds = list(PEAK_FLOPS)
    for index, kind in enumerate(kinds):
        assert not any(earlier in kind for earlier in kinds[:index])
