"""The decoder: parity with the residual baseline, scan against plain loop, causality, packing, shapes of everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import worst

from attnres_jax import ModelConfig, build_model
from attnres_jax.config import DepthConfig
from attnres_jax.models import unrolled

# eps is negligible here: a mean of K sources is K times smaller than their sum, so that RMSNorm's eps bites K^2 harder
# and the two functions differ by that much (the default eps is tested on its own below).
TINY = ModelConfig(
    vocab_size=61, width=24, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=32, max_length=12, norm_eps=1e-14
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 61)
SEGMENTS = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [2] * 3])
POSITIONS = jnp.array([[*range(5), *range(7)], [*range(9), *range(3)]])
OPTIONS = {
    "sigmoid": {"weights": "sigmoid"},
    "no key norm": {"key_norm": False},
    "heads": {"heads": 4},
    "scalars": {"query": "none"},
    "input query": {"query": "input"},
    "key scales of any value": {},
    "wide window": {"window": 6},
    "sum of the sources": {"sum_sources": True},
}
NO_PARITY = {"narrow window": {"window": 1}, "recency": {"recency_bias": 1.0}}
RULES = [("block", 1), ("block", 2), ("block", 4), ("block", 6), ("full", 4)]  # six sublayers: 4 leaves a short block


def make(rule, block_size, options=None, **changes):
    depth = DepthConfig(rule=rule, block_size=block_size, **(options or {}))
    config = dataclasses.replace(TINY, depth=depth, **changes)
    return build_model(config, rngs=nnx.Rngs(0))


def with_queries(model, scale=0.3):
    """A copy whose queries and key scales are drawn, so that depth attention does something."""
    sites = jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(7), x.shape), model.sites)
    model = jax.tree.map(lambda x: x, model)
    model.sites = sites
    return model


def objective(forward):
    return lambda model: (jax.nn.log_softmax(forward(model))[..., 3] ** 2).mean()


def value_and_gradients(model, forward):
    return jax.jit(lambda model: (forward(model), jax.grad(objective(forward))(model)))(model)


@pytest.fixture(scope="module")
def baseline():
    return value_and_gradients(make("residual", 2), lambda model: model(TOKENS, SEGMENTS, POSITIONS))


@pytest.mark.parametrize("rule, block_size", RULES)
def test_zero_queries_are_the_residual_baseline(rule, block_size, baseline):
    """The same logits and backbone gradients at every block size, a short last block too (section 5)."""
    logits, gradients = value_and_gradients(make(rule, block_size), lambda model: model(TOKENS, SEGMENTS, POSITIONS))
    assert worst(logits, baseline[0]) < 1e-5
    for part in ("embedding", "sublayers", "final_norm"):
        assert worst(getattr(gradients, part), getattr(baseline[1], part)) < 1e-5
    assert float(jnp.abs(gradients.sites.query[1:]).max(1).min()) > 0  # and the queries are free to move


@pytest.mark.parametrize("name", [*OPTIONS, *NO_PARITY])
@pytest.mark.parametrize("rule", ["block", "full"])
def test_options_keep_the_parity_or_lose_it(rule, name, baseline):
    """As docs/semantics.md says: the baseline's logits and backbone gradients, or other ones."""
    model = make(rule, 2, (OPTIONS | NO_PARITY)[name])
    if name == "key scales of any value":
        model.sites.key_scale[...] = jax.random.normal(jax.random.key(3), model.sites.key_scale.shape)
    logits, gradients = value_and_gradients(model, lambda model: model(TOKENS, SEGMENTS, POSITIONS))
    if name in NO_PARITY:
        assert worst(logits, baseline[0]) > 1e-2
        return
    assert worst(logits, baseline[0]) < 1e-5
    for part in ("embedding", "sublayers", "final_norm"):
        assert worst(getattr(gradients, part), getattr(baseline[1], part)) < 1e-5


@pytest.mark.parametrize("rule", ["lambdas", "hyper_connections", "mhc", "mhc_lite", "denseformer", "muddformer"])
def test_other_rules_that_start_as_the_residual_baseline(rule, baseline):
    forward = jax.jit(lambda model: model(TOKENS, SEGMENTS, POSITIONS))
    assert worst(forward(make(rule, 4)), baseline[0]) < 1e-5


@pytest.mark.parametrize("rule", ["rezero", "layerscale", "rms_block", "delta", "delta_block"])
def test_other_rules_that_do_not(rule, baseline):
    forward = jax.jit(lambda model: model(TOKENS, SEGMENTS, POSITIONS))
    assert worst(forward(make(rule, 4)), baseline[0]) > 1e-2


def test_zero_queries_at_the_default_eps_differ_by_eps_alone(baseline):
    """At eps=1e-6 and embeddings of 0.02 the difference is small; it falls with eps."""
    forward = lambda model: model(TOKENS, SEGMENTS, POSITIONS)  # noqa: E731
    gaps = []
    for eps in (1e-6, 1e-8):
        pair = [jax.jit(forward)(make(rule, 4, norm_eps=eps)) for rule in ("block", "residual")]
        gaps.append(worst(*pair))
    assert gaps[0] < 2e-2
    assert gaps[1] < gaps[0] / 20


@pytest.mark.parametrize("rule", ["block", "full"])
def test_with_sum_sources_eps_makes_no_difference(rule):
    """Where the mean of the sources differs by 2 % (the test above), their number times it does not."""
    forward = lambda model: model(TOKENS, SEGMENTS, POSITIONS)  # noqa: E731
    pair = [
        jax.jit(forward)(make(rule, 4, {"sum_sources": True}, norm_eps=1e-5)),
        jax.jit(forward)(make("residual", 4, norm_eps=1e-5)),
    ]
    assert worst(*pair) < 2e-6


@pytest.mark.parametrize("rule, block_size", [("residual", 2), ("block", 4), ("full", 4)])
def test_scan_equals_the_plain_loop(rule, block_size):
    model = make(rule, block_size, norm_eps=1e-6)
    model = model if rule == "residual" else with_queries(model)
    fast = value_and_gradients(model, lambda model: model(TOKENS, SEGMENTS, POSITIONS))
    slow = value_and_gradients(model, lambda model: unrolled(model, TOKENS, SEGMENTS, POSITIONS).logits)
    assert worst(fast, slow) < 1e-5


@pytest.mark.parametrize("rule", ["residual", "block", "full"])
def test_remat_changes_nothing(rule):
    results = []
    for remat in ("none", "dots", "full"):
        model = make(rule, 4, remat=remat, norm_eps=1e-6)
        model = model if rule == "residual" else with_queries(model)
        logits, gradients = value_and_gradients(model, lambda model: model(TOKENS, SEGMENTS))
        results.append((logits, jax.tree.leaves(gradients)))  # the configuration, remat in it, is part of the tree
    assert worst(results[1], results[0]) < 5e-6
    assert worst(results[2], results[0]) < 5e-6


@pytest.mark.parametrize("rule", ["residual", "block", "full"])
def test_causality_and_packing_by_gradients(rule):
    """The logits at a position depend on the tokens of its own document up to it, and on no others."""
    model = make(rule, 4, norm_eps=1e-6)
    model = model if rule == "residual" else with_queries(model)

    def summed(offsets, position):
        return forward_from(model, offsets)[:, position].sum()

    influence = jax.jit(jax.vmap(jax.grad(summed), in_axes=(None, 0)))
    seen = jnp.abs(influence(jnp.zeros((2, 12, 24)), jnp.arange(12))).max(-1)  # [out, row, in]
    allowed = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & jnp.tril(jnp.ones((12, 12), bool))
    np.testing.assert_array_equal(np.asarray(seen.transpose(1, 0, 2) > 0), np.asarray(allowed))


def forward_from(model, offsets):
    """The model with `offsets` added to its token embeddings."""
    embedding = model.embedding

    class Shifted(type(embedding)):
        def __init__(self):
            self.table, self.dtype = embedding.table, embedding.dtype

        def __call__(self, tokens):
            return embedding(tokens) + offsets

    shifted = jax.tree.map(lambda x: x, model)
    shifted.embedding = Shifted()
    return shifted(TOKENS, SEGMENTS, POSITIONS)


def test_packed_documents_equal_the_same_documents_alone():
    model = with_queries(make("block", 4, norm_eps=1e-6))
    run = jax.jit(lambda tokens, *rest: model(tokens, *rest))
    packed = run(TOKENS, SEGMENTS, POSITIONS)
    np.testing.assert_allclose(packed[0, :5], run(TOKENS[:1, :5])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[0, 5:], run(TOKENS[:1, 5:])[0], rtol=1e-4, atol=1e-5)


def test_trace_holds_what_the_equations_say():
    model = with_queries(make("block", 4, norm_eps=1e-6))
    trace = jax.jit(lambda model: unrolled(model, TOKENS))(model)
    assert trace.inputs.shape == (7, 2, 12, 24)
    assert [len(w) for w in trace.weights] == [1, 2, 2, 2, 2, 3, 3]
    np.testing.assert_allclose(trace.states[3], trace.outputs[:4].sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trace.states[5], trace.outputs[4:].sum(0), rtol=1e-5, atol=1e-5)
    sources = jnp.stack([trace.inputs[0], trace.states[3], trace.outputs[4]])
    np.testing.assert_allclose(trace.inputs[5], (trace.weights[5][..., None] * sources).sum(0), rtol=1e-5, atol=1e-5)


def test_probes_see_the_gradient_of_the_outputs():
    """For the residual rule the gradient of the last output is that of the final stream."""
    model = make("residual", 2, norm_eps=1e-6)
    loss = lambda logits: (logits**2).sum()  # noqa: E731
    probes = jnp.zeros((6, 2, 12, 24))
    gradient = jax.jit(jax.grad(lambda probes: loss(unrolled(model, TOKENS, probes=probes).logits)))(probes)
    last = unrolled(model, TOKENS).inputs[-1]
    np.testing.assert_allclose(gradient[-1], jax.grad(lambda h: loss(model.logits(h)))(last), rtol=1e-4, atol=1e-5)


def test_parameters_do_not_depend_on_the_rule_and_bfloat16_runs():
    shapes = [
        jax.tree.leaves(jax.tree.map(jnp.shape, make(rule, 4).sublayers)) for rule in ("residual", "block", "full")
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    low = with_queries(make("block", 4, dtype="bfloat16", norm_eps=1e-6))
    high = with_queries(make("block", 4, norm_eps=1e-6))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low))
    logits = jax.jit(lambda model: model(TOKENS, SEGMENTS))(low)
    assert logits.dtype == jnp.float32
    assert 1e-4 < worst(logits, jax.jit(lambda model: model(TOKENS, SEGMENTS))(high)) < 5e-2


def test_untied_head_and_head_dim_and_too_long_a_row():
    model = make("block", 4, tie_embeddings=False, head_dim=8, qk_norm=False)
    assert model.head is not None and model(TOKENS).shape == (2, 12, 61)
    with pytest.raises(ValueError, match="max_length=12"):
        model(jnp.zeros((1, 13), jnp.int32))


@pytest.mark.parametrize(
    "tokens, given",
    [(jnp.arange(10), r"int32\[10\]"), ([[1, 2]], "a list; jnp.asarray"), (jnp.ones((1, 4)), r"float32\[1, 4\]")],
)
@pytest.mark.usefixtures("unhooked")
def test_tokens_that_are_no_integers_b_t(tokens, given):
    with pytest.raises(ValueError, match=rf"^tokens must be \[B, T\] of integers, not {given}"):
        make("block", 4)(tokens)
