"""The operator against equations 2 to 4 in NumPy float64, and its forms against each other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import HIGHEST, precisions, worst

from attnres_jax.depth import depth_attention, inter_block, merge, normalise, operator
from attnres_jax.depth.operator import depth_logits, folded, logits_and_rms, logits_transpose
from attnres_jax.depth.reference import plain_depth_attention
from attnres_jax.depth.weighting import group_logits


def draw(seed, num_sources, width=24, sites=1, batch=(2, 5)):
    keys = jax.random.split(jax.random.key(seed), 4)
    sources = 3 * jax.random.normal(keys[0], (num_sources, *batch, width))
    queries = jax.random.normal(keys[1], (sites, width)) / 4
    key_scales = 1 + jax.random.normal(keys[2], (sites, width)) / 4
    return sources, queries, key_scales, jax.random.normal(keys[3], (*batch, width))


def value_and_gradients(form, cotangent, *arguments):
    def both(*arguments):
        value, pullback = jax.vjp(form, *arguments)
        return value, pullback(cotangent)

    return jax.jit(both)(*arguments)


def numpy_attention(sources, query, key_scale, eps=1e-6):
    """Equations 2 to 4 with no code of the package."""
    values = np.asarray(sources, np.float64)
    keys = np.asarray(key_scale, np.float64) * values / np.sqrt((values**2).mean(-1, keepdims=True) + eps)
    exps = np.exp(keys @ np.asarray(query, np.float64))
    weights = exps / exps.sum(0)
    return (weights[..., None] * values).sum(0), weights


@pytest.mark.parametrize("num_sources", [1, 2, 4, 5, 9])
def test_direct_form_equals_the_equations(num_sources):
    sources, queries, key_scales, _ = draw(0, num_sources)
    mixed, weights = depth_attention(sources, queries[0], key_scales[0], return_weights=True)
    expected, expected_weights = numpy_attention(sources, queries[0], key_scales[0])
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6)
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-6)


@pytest.mark.parametrize("num_sources", [2, 4, 9])
def test_forms_agree_in_values_and_gradients(num_sources):
    """Plain (differentiated by JAX), direct and two-phase (by hand): 1e-6 in float32."""
    sources, queries, key_scales, cotangent = draw(1, num_sources)

    def plain(sources, query, key_scale):
        return plain_depth_attention(list(sources), query, key_scale)[0]

    def two_phase(sources, query, key_scale):
        bank = jnp.concatenate([sources[:-1], 100 * sources])  # what lies behind num_valid must not matter
        state = inter_block(bank, query[None], key_scale[None], num_sources - 1)
        return merge(state.site(0), sources[-1], query, key_scale)

    results = []
    for form in (plain, depth_attention, two_phase):
        results.append(value_and_gradients(form, cotangent, sources, queries[0], key_scales[0]))
    assert worst(results[1], results[0]) < 1e-6
    assert worst(results[2], results[0]) < 1e-6


@pytest.mark.parametrize("num_sources", [1, 3, 4, 9])
def test_hand_written_backward_is_exact_in_float64(num_sources):
    """All sites of a block at once, every prefix of the bank."""
    with jax.enable_x64(True):
        draws = draw(num_sources, num_sources, width=7, sites=3, batch=(3,))[:3]
        draws = tuple(x.astype(jnp.float64) for x in draws)
        cotangent = jax.random.normal(jax.random.key(0), (3, 3, 7), jnp.float64)

        def plain(sources, queries, key_scales, num_valid):
            mix = lambda q, s: plain_depth_attention(list(sources[:num_valid]), q, s)[0]  # noqa: E731
            return jnp.stack([mix(q, s) for q, s in zip(queries, key_scales, strict=True)])

        def fast(sources, queries, key_scales, num_valid):
            return normalise(inter_block(sources, queries, key_scales, num_valid))

        run = jax.jit(lambda n, *draws: value_and_gradients(lambda *draws: fast(*draws, n), cotangent, *draws))
        for num_valid in range(1, num_sources + 1):
            expected = value_and_gradients(lambda *draws, n=num_valid: plain(*draws, n), cotangent, *draws)
            assert worst(run(num_valid, *draws), expected) < 1e-12


def test_no_key_scale_stands_for_ones():
    sources, queries, _, _ = draw(2, 3)
    ones = jnp.ones_like(queries[0])
    np.testing.assert_array_equal(depth_attention(sources, queries[0]), depth_attention(sources, queries[0], ones))
    state = inter_block(sources, queries, None, 2)
    np.testing.assert_array_equal(state.numerator, inter_block(sources, queries, ones[None], 2).numerator)
    np.testing.assert_array_equal(
        merge(state.site(0), sources[2], queries[0]), merge(state.site(0), sources[2], queries[0], ones)
    )


@pytest.mark.parametrize("num_valid", [-1, 0, 4, np.int64(5), jnp.int32(4)])
@pytest.mark.usefixtures("unhooked")
def test_a_bank_has_between_one_and_all_of_its_sources(num_valid):
    sources, queries, _, _ = draw(2, 3)
    with pytest.raises(ValueError, match=f"num_valid={num_valid} of a bank of 3 sources must be from 1 to 3"):
        inter_block(sources, queries, None, num_valid)


def test_scaling_a_source_leaves_the_weights_and_scales_its_contribution():
    sources, queries, key_scales, _ = draw(3, 4)
    mixed, weights = depth_attention(sources, queries[0], key_scales[0], eps=0.0, return_weights=True)
    scaled = sources.at[2].multiply(8.0)
    mixed_scaled, weights_scaled = depth_attention(scaled, queries[0], key_scales[0], eps=0.0, return_weights=True)
    np.testing.assert_allclose(weights_scaled, weights, rtol=1e-5)
    np.testing.assert_allclose(mixed_scaled - mixed, 7 * weights[2][..., None] * sources[2], rtol=1e-4, atol=1e-5)


def test_zero_query_reads_the_mean():
    sources, _, key_scales, _ = draw(4, 5)
    np.testing.assert_allclose(
        depth_attention(sources, jnp.zeros(24), key_scales[0]), sources.mean(0), rtol=1e-5, atol=1e-6
    )


def test_logits_are_unscaled_and_float32_for_bfloat16_sources():
    sources, queries, key_scales, _ = draw(5, 3)
    low = sources.astype(jnp.bfloat16)
    logits = depth_logits(low, queries, key_scales, 1e-6)
    assert logits.dtype == jnp.float32
    values = np.asarray(low, np.float64)
    rms = np.sqrt((values**2).mean(-1) + 1e-6)
    expected = values @ np.asarray(queries[0] * key_scales[0], np.float64) / rms
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)
    assert depth_attention(low, queries[0], key_scales[0]).dtype == jnp.bfloat16
    for form, given in ((depth_logits, low), (group_logits, low.reshape(*low.shape[:-1], 2, -1))):
        total = lambda *given, form=form: form(*given, 1e-6).sum()  # noqa: E731
        program = jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(given, queries, key_scales)
        assert precisions(program) == {HIGHEST}


def test_the_backward_pass_of_logits_from_what_they_returned():
    sources, unfolded, key_scales, _ = draw(5, 3)
    queries = folded(unfolded, key_scales)
    logits, rms = logits_and_rms(sources, queries, 1e-6)
    logits_bar = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)

    def plain(sources, queries):
        keys = sources / jnp.sqrt(jnp.mean(sources**2, axis=-1, keepdims=True) + 1e-6)
        return jnp.einsum("...d,sd->s...", keys, queries)

    _, expected = jax.vjp(plain, sources, queries)
    given = (sources, queries, rms, logits, logits_bar)
    for ours, theirs in zip(logits_transpose(*given), expected(logits_bar), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    _, pullback = jax.vjp(lambda *given: depth_logits(*given, 1e-6), sources, unfolded, key_scales)
    _, expected = jax.vjp(lambda v, w, g: plain(v, w * g), sources, unfolded, key_scales)
    for ours, theirs in zip(pullback(logits_bar), expected(logits_bar), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # One product, for the cotangent of the queries, and none of a forward pass.
    assert jax.jit(logits_transpose).lower(*given).as_text().count("dot_general") == 1


@pytest.mark.parametrize("logits, groups", [(depth_logits, ()), (group_logits, (2,))])
def test_queries_and_scales_kept_in_bfloat16_are_multiplied_in_float32(logits, groups):
    sources, queries, key_scales, _ = draw(5, 3)
    sources = sources.reshape(*sources.shape[:-1], *groups, -1)
    low = [x.astype(jnp.bfloat16) for x in (queries, key_scales)]
    wide = [x.astype(jnp.float32) for x in low]
    np.testing.assert_array_equal(logits(sources, *low, 1e-6), logits(sources, *wide, 1e-6))


def test_a_site_without_sources_is_refused():
    with pytest.raises(ValueError, match="a site needs at least one"):
        depth_attention(jnp.zeros((0, 2, 24)), jnp.zeros(24))


SOURCES, QUERY = jnp.zeros((3, 2, 24)), jnp.zeros(24)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: depth_attention([*SOURCES], QUERY),
            "sources must be [N, *batch, D] of floats, not a list; jnp.asarray makes an array of it",
        ),
        (lambda: depth_attention(QUERY, QUERY), "sources must be [N, *batch, D] of floats, not float32[24]"),
        (lambda: depth_attention(SOURCES.astype(int), QUERY), "of floats, not int32[3, 2, 24]"),
        (lambda: depth_attention(SOURCES, QUERY[:7]), "query must be [24] of floats, not float32[7]"),
        (lambda: depth_attention(SOURCES, QUERY, QUERY[:1]), "key_scale must be [24] of floats, not float32[1]"),
        (lambda: inter_block(SOURCES, QUERY, None, 3), "queries must be [S, 24] of floats, not float32[24]"),
        (
            lambda: inter_block(SOURCES, jnp.zeros((2, 24)), QUERY[None], 3),
            "key_scales must be [2, 24] of floats, not float32[1, 24]",
        ),
        (
            lambda: merge(inter_block(SOURCES, QUERY[None], None, 3), SOURCES[0], QUERY),
            "state.numerator must be [2, 24] of floats, not float32[1, 2, 24]; one site's part is state.site(i)",
        ),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.usefixtures("unhooked")
def test_misuse_is_one_line_that_names_the_argument_its_shape_and_the_right_one(call, message, traced):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        jax.jit(call)() if traced else call()
    assert "\n" not in str(error.value)


def test_the_checks_leave_no_trace_in_a_program():
    sources, queries, key_scales, newest = draw(2, 3)

    def two_phases(n):
        return merge(inter_block(sources, queries, key_scales, n).site(0), newest, queries[0], key_scales[0])

    checked = str(jax.make_jaxpr(two_phases)(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "expect", lambda *_: None)
        assert str(jax.make_jaxpr(two_phases)(2)) == checked


def test_extreme_logits_stay_finite():
    sources, queries, key_scales, cotangent = draw(6, 5)
    value, gradients = value_and_gradients(depth_attention, cotangent, sources, 1e4 * queries[0], key_scales[0])
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *gradients))


def test_backward_keeps_no_copy_of_the_sources():
    """What a mix saves beyond its inputs is a few float32 scalars a token and source."""
    sources, queries, key_scales, _ = draw(7, 6, width=512)
    _, pullback = jax.vjp(depth_attention, sources, queries[0], key_scales[0])
    inputs = {id(x) for x in (sources, queries, key_scales)}
    saved = [x for x in jax.tree.leaves(pullback) if id(x) not in inputs]
    kept = sum(x.size for x in saved if x.shape != sources.shape)
    assert sum(x.shape == sources.shape for x in saved) <= 1  # the sources themselves
    assert kept < sources.size / 4
