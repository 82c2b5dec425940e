"""Every rule of the registry and every option: scan against plain loop, gradients, matrices, starts, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import HIGHEST, precisions, worst
from toy_stacks import SUBLAYERS, WIDTH, draw, looped, plain, scanned, value_and_gradients

from attnres_jax.depth import RULES, Full, Options, Rule, make_rule
from attnres_jax.depth.delta import Delta

EPS = 1e-6
OPTIONS = {
    "sigmoid": {"weights": "sigmoid"},
    "no key norm": {"key_norm": False},
    "heads": {"heads": 3},
    "window": {"window": 1},
    "recency": {"recency_bias": 1.5},
    "scalars": {"query": "none"},
    "input query": {"query": "input"},
    "input query and sigmoid": {"query": "input", "weights": "sigmoid"},
    "all at once": {"weights": "sigmoid", "key_norm": False, "heads": 2, "window": 2, "recency_bias": -1.0},
    "input query and all": {"query": "input", "heads": 2, "window": 2, "recency_bias": 1.0, "key_norm": False},
    "sum": {"sum_sources": True},
    "sum and all": {"sum_sources": True, "query": "input", "heads": 2, "recency_bias": 1.0, "key_norm": False},
    "scalars in a window": {"query": "none", "window": 2, "recency_bias": 0.5},
}
CASES = [(name, {}) for name in RULES] + [
    (name, options)
    for options in OPTIONS.values()
    for name in ("block", "full", "rms_block")
    if name != "rms_block" or options.get("query") != "input"
]
IDS = [f"{name} {' '.join(f'{k}={v}' for k, v in options.items())}".strip() for name, options in CASES]
WITH_OPTIONS = [("block", options) for options in OPTIONS.values()]
FEW = [(name, {}) for name in RULES] + WITH_OPTIONS
# Compiled, the options cost as much as the rules; `make test` leaves what they share with them to `make test-slow`.
MOST_SLOW = [*FEW[: len(RULES)], *(pytest.param(*case, marks=pytest.mark.slow) for case in WITH_OPTIONS)]
# An option of `rms_block` is the one of `block`, which takes other outputs: all of them at once say so.
SCANNED = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == "rms_block" and 0 < len(case[1]) < 5), id=name)
    for case, name in zip(CASES, IDS, strict=True)
]
ROWS_SUM_TO_ONE = ("block", "full", "rms_block", "delta", "delta_block")


def make(name, options, block_size=4):
    return make_rule(name, block_size, EPS, Options(**options))


@pytest.mark.parametrize("name, options", SCANNED)
def test_scan_equals_the_plain_loop_in_float64(name, options):
    """Values, reports and gradients of everything; blocks of 4 leave a short last one."""
    with jax.enable_x64(True):
        for block_size, remat in ((4, "full"),) if options else ((4, "full"), (2, "none")):
            rule = make(name, options, block_size)
            stacks, sites, embedding, context = draw(rule)
            forms = functools.partial(looped, rule, context), functools.partial(scanned, rule, context, remat)
            expected, found = (value_and_gradients(form, stacks, sites, embedding) for form in forms)
            assert worst(found, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_remat_policy_is_the_plain_loop_in_float64(name):
    with jax.enable_x64(True):
        rule = make(name, {})
        stacks, sites, embedding, context = draw(rule)
        expected = value_and_gradients(functools.partial(looped, rule, context), stacks, sites, embedding)
        for remat in ("none", "dots"):  # "full" is the test's above
            form = functools.partial(scanned, rule, context, remat)
            assert worst(value_and_gradients(form, stacks, sites, embedding), expected) < 1e-12


@pytest.mark.parametrize("name, options", FEW)
def test_every_site_reads_the_models_dtype(name, options):
    """In bfloat16, the first site of a block too; the sublayers assert it."""
    rule = make(name, options)
    stacks, sites, embedding, context = draw(rule, jnp.bfloat16)
    for form in (functools.partial(scanned, rule, context, "none"), functools.partial(plain, rule, context)):
        jax.eval_shape(form, stacks, sites, embedding)
    total = lambda *own: scanned(rule, context, "none", *own)[0].sum()  # noqa: E731
    program = jax.make_jaxpr(jax.value_and_grad(total, (0, 1, 2)))(stacks, sites, embedding)
    assert {str(out.dtype) for out in program.out_avals} == {"bfloat16"}
    assert precisions(program) <= {HIGHEST}  # what is widened is not rounded again where it is multiplied


@pytest.mark.parametrize("name, options", MOST_SLOW[1:])
def test_a_gradient_equals_a_finite_difference(name, options):
    """Along one direction in all of the rule's parameters and the embedding."""
    with jax.enable_x64(True):
        rule = make(name, options)
        stacks, sites, embedding, context = draw(rule)

        def loss(moved):
            return (scanned(rule, context, "none", stacks, *moved)[0] ** 2).sum()

        point = (sites, embedding)
        direction = jax.tree.map(lambda x: np.sin(1 + np.arange(x.size, dtype=x.dtype)).reshape(x.shape), point)
        along = lambda step: loss(jax.tree.map(lambda x, d: x + step * d, point, direction))  # noqa: E731
        value_and_slope = jax.jit(jax.value_and_grad(along))
        (after, _), (before, _), (_, slope) = (value_and_slope(step) for step in (1e-5, -1e-5, 0.0))
        np.testing.assert_allclose(slope, (after - before) / 2e-5, rtol=1e-5)


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_matrix_says_what_each_site_reads(name, options):
    """The effective weights times embedding and outputs are the inputs; with heads, their mean over the groups is."""
    with jax.enable_x64(True):
        rule = make(name, options)
        stacks, sites, embedding, context = draw(rule)
        if name == "layerscale":  # gains of a sublayer's channels are made equal: the matrix has their mean
            gain = jnp.broadcast_to(sites.gain[...].mean(1, keepdims=True), sites.gain.shape)
            sites = jax.tree.map(lambda _: gain, sites)
        run = jax.tree.map(np.asarray, plain(rule, context, stacks, sites, embedding))
        sources = np.stack([embedding, *run.outputs])
        assert [len(row) for row in run.matrix] == list(range(1, SUBLAYERS + 2))
        assert len(run.inputs) == SUBLAYERS + 1 and len(run.outputs) == len(run.states) == SUBLAYERS
        for h, row in zip(run.inputs, run.matrix, strict=True):
            assert row.shape[1:] == embedding.shape[:-1]
            if options.get("heads", 1) == 1:
                assert worst(np.einsum("n...,n...d->...d", row, sources[: len(row)]), h) < 1e-12
        if name in ROWS_SUM_TO_ONE and options.get("weights") != "sigmoid":
            for weights in run.weights:
                np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-12)
        if options.get("window"):
            count = [int((weights > 0).sum(0).max()) for weights in run.weights]
            assert max(count) == 1 + options["window"]


@pytest.mark.parametrize("name, options", MOST_SLOW)
def test_states_keep_bfloat16_and_weights_are_float32(name, options):
    rule = make(name, options)
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    stacks, embedding, context = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (stacks, embedding, context))
    forms = (functools.partial(scanned, rule, context, "none"), functools.partial(plain, rule, context))
    (out, _), run = jax.jit(lambda *own: [form(*own) for form in forms])(stacks, sites, embedding)
    assert out.dtype == run.inputs[-1].dtype == jnp.bfloat16
    assert {row.dtype for row in run.matrix} == {jnp.dtype("float32")}
    _, newest = rule.begin(sites, embedding)
    if newest is not None:
        slot = jax.eval_shape(lambda newest: rule.slot(sites, newest, 0), newest)
        assert jax.tree.leaves(slot)[0].dtype == jnp.bfloat16
    assert worst(out, run.inputs[-1]) < 0.05


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_what_the_scan_and_the_decoder_ask_for(name):
    rule = make(name, {})
    assert isinstance(rule, Rule)
    assert all(callable(getattr(rule, method)) for method in ("init_sites", "begin", "readout", "plain", "flops"))
    expected = {"block": 1, "rms_block": 1, "delta_block": 1, "full": 4, "delta": 4, "denseformer": 4, "muddformer": 4}
    assert rule.num_appended(4) == expected.get(name, 0)
    assert (rule.begin(rule.init_sites(SUBLAYERS, WIDTH), jnp.ones((2, WIDTH)))[1] is None) == (name not in expected)


def test_flops_count_the_sources_that_are_read():
    """Eight sublayers, blocks of four, width 1: logit and mix are 4 operations a source."""
    assert make("block", {}).flops(8, 1) == 4 * (1 + 3 * 2 + 2 + 3 * 3 + 3)
    assert make("delta_block", {}).flops(8, 1) == 4 * (4 * 1 + 4 * 2 + 3)  # the own block is in the stream
    assert make("full", {}).flops(8, 1) == 4 * sum(range(1, 10))


def test_blocks_of_one_sublayer_are_rules_without_blocks():
    assert isinstance(make("block", {}, 1), Full) and make("block", {}, 1).block_size == 2
    assert type(make("delta_block", {}, 1)) is Delta
    with pytest.raises(ValueError, match=r"block_size=1 .* nearest: block_size=2"):
        make("rms_block", {}, 1)
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        make("block", {}, 0)
    with pytest.raises(ValueError, match="heads=5 does not divide the width 12"):
        make("block", {"heads": 5}).init_sites(SUBLAYERS, WIDTH)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("blok", {}, "rule='blok' is unknown; known: residual, rezero"),
        ("residual", {"window": 2}, "window=2 is no option of residual; its options: none"),
        ("mhc", {"heads": 2}, "heads=2 is no option of mhc; its options: streams"),
        ("block", {"streams": 2}, "streams=2 is no option of block; its options: query, weights, key_norm"),
        ("block", {"weights": "softmaxx"}, "weights='softmaxx' is unknown; known: softmax, sigmoid"),
        ("block", {"query": "static"}, "query='static' is unknown; known: learned, input, none"),
        ("rms_block", {"query": "input"}, "query='input' is no option of rms_block; rules with it: block, full"),
        ("block", {"query": "none", "key_norm": False}, "key_norm=False has no effect with query='none'"),
        ("block", {"query": "none", "heads": 2}, "heads=2 has no effect with query='none'"),
        ("block", {"window": -1}, "window=-1 must be at least 0"),
        ("block", {"heads": 0}, "heads=0 must be at least 1"),
        ("hyper_connections", {"streams": 0}, "streams=0 must be at least 1"),
        ("mhc", {"streams": 1}, "streams=1 leaves nothing to mix; nearest: streams=2"),
        ("mhc_lite", {"streams": 5}, "streams=5 is too many for mhc_lite, .* nearest: streams=4"),
    ],
)
def test_impossible_rules_are_refused_with_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(name, options)
    assert "\n" not in str(error.value)


def test_recency_bias_is_where_the_learned_scalar_starts():
    rule = make("block", {"recency_bias": 2.0})
    np.testing.assert_array_equal(rule.init_sites(4, 8).recency[...], np.full(5, 2.0))
    stacks, sites, embedding, context = draw(rule, jnp.float32, perturb=0)
    weights = plain(rule, context, stacks, sites, embedding).weights[-1]
    np.testing.assert_allclose(weights[-1] / weights[0], np.exp(2.0), rtol=1e-5)


@pytest.mark.parametrize("name", ["block", "full"])
def test_options_that_change_nothing_change_nothing(name):
    """One head, a window as wide as the stack and a projection at zero are the rule without options."""
    with jax.enable_x64(True):
        base = make(name, {})
        stacks, sites, embedding, context = draw(base)
        projected = make(name, {"query": "input"})
        with_projection = projected.init_sites(SUBLAYERS, WIDTH)
        with_projection.query, with_projection.key_scale = sites.query, sites.key_scale
        run = lambda rule, sites: jax.jit(functools.partial(scanned, rule, context, "none"))(stacks, sites, embedding)  # noqa: E731
        expected = run(base, sites)
        assert worst(run(make(name, {"window": 7}), sites), expected) < 1e-13
        assert worst(run(projected, with_projection), expected) < 1e-12
