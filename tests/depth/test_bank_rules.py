"""Rules that read a bank: where they start, and what their papers say of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import worst
from toy_stacks import SUBLAYERS, WIDTH, draw, plain, scanned

from attnres_jax.depth import Residual
from attnres_jax.depth.delta import Delta
from attnres_jax.depth.delta_block import DeltaBlock
from attnres_jax.depth.denseformer import DenseFormer
from attnres_jax.depth.muddformer import MUDDFormer
from attnres_jax.depth.operator import unit_rms
from attnres_jax.depth.reference import unit_rms as plain_unit_rms
from attnres_jax.depth.rms_block import RMSBlock


def test_denseformer_starts_as_the_residual_sum():
    with jax.enable_x64(True):
        rule = DenseFormer(2, 1e-6)
        stacks, sites, embedding, context = draw(rule, perturb=0)
        residual = plain(Residual(2, 1e-6), context, stacks, None, embedding)
        assert worst(plain(rule, context, stacks, sites, embedding).inputs, residual.inputs) < 1e-13


def test_muddformer_weights_are_the_papers():
    """One token, in numpy: GELU(norm(x) W1) W2 + a; the GELU of the released code, by the error function."""
    with jax.enable_x64(True):
        rule = MUDDFormer(2, 1e-2)
        _, sites, _, _ = draw(rule)
        state = np.random.default_rng(7).normal(size=WIDTH)
        hidden, out, static = (np.asarray(getattr(sites, name)[...])[3] for name in ("hidden", "out", "weight"))
        x = state / np.sqrt((state**2).mean() + 1e-2) @ hidden
        expected = x / 2 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x])) @ out + static
        np.testing.assert_allclose(rule.weights(sites, 3, jnp.asarray(state)), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", [Delta, DeltaBlock])
def test_delta_starts_as_the_stream_and_the_mean_of_its_sources(kind):
    """Not the residual sum: of the n sources and the null source each has the weight 1 / (n + 1)."""
    with jax.enable_x64(True):
        rule = kind(2, 1e-6)
        stacks, sites, embedding, context = draw(rule, perturb=0)
        run = plain(rule, context, stacks, sites, embedding)
        total = sum(run.outputs)
        count = SUBLAYERS if kind is Delta else SUBLAYERS // 2
        assert worst(run.inputs[-1], embedding + (1 + 1 / (count + 1)) * total) < 1e-13


def test_delta_with_blocks_of_one_output_is_delta():
    with jax.enable_x64(True):
        delta = Delta(2, 1e-6)
        stacks, sites, embedding, context = draw(delta)
        results = [scanned(rule, context, "none", stacks, sites, embedding) for rule in (delta, DeltaBlock(1, 1e-6))]
        assert worst(*results) < 1e-13


def test_rms_block_completed_blocks_do_not_depend_on_the_scale_of_an_output():
    """The output of the last sublayer, ten times as large, changes nothing for the head: its block is complete."""
    with jax.enable_x64(True):
        rule = RMSBlock(4, 0.0)
        stacks, sites, embedding, _ = draw(rule)
        own = [lambda h, weight=weight: h @ weight for weight in stacks["linear"]]
        larger = [*own[:-1], lambda h: 10 * own[-1](h)]
        results = [rule.plain(sites, embedding, sublayers).inputs[-1] for sublayers in (own, larger)]
        assert worst(*results) < 1e-13


def test_a_normalised_output_has_the_plain_gradient_and_is_kept_once():
    with jax.enable_x64(True):
        y, bar = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 16)))
        _, plain_pullback = jax.vjp(lambda y: plain_unit_rms(y, 1e-2), y)
        read, pullback = jax.vjp(lambda y: unit_rms(y, 1e-2), y)
        assert worst((read, pullback(bar)), (plain_unit_rms(y, 1e-2), plain_pullback(bar))) < 1e-14
        assert sum(x.size for x in jax.tree.leaves(pullback)) == y.size + y[..., 0].size


def test_a_normalised_output_of_half_precision_is_rounded_once():
    y = jnp.asarray(np.random.default_rng(1).normal(size=(7, 32)), jnp.bfloat16)
    wide = y.astype(jnp.float32)
    read, pullback = jax.vjp(lambda y: unit_rms(y, 1e-6), y)
    wide_read, wide_pullback = jax.vjp(lambda y: unit_rms(y, 1e-6), wide)
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, wide_read.astype(jnp.bfloat16))
    (bar,), (wide_bar,) = pullback(read), wide_pullback(read.astype(jnp.float32))
    np.testing.assert_array_equal(bar, wide_bar.astype(jnp.bfloat16))
