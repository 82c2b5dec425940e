"""The append-only scan against the rules' plain loops, on sublayers that know nothing of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stacks
from numerics import HIGHEST, equations, worst
from toy_stacks import WIDTH, call, value_and_gradients

from attnres_jax.depth import Segment, depth_scan, make_rule
from attnres_jax.models.plan import cut

PLAN = ["tanh", "linear"] * 5
draw, scanned, looped = (
    functools.partial(form, plan=PLAN) for form in (toy_stacks.draw, toy_stacks.scanned, toy_stacks.looped)
)

RULES = [
    ("residual", 2),
    ("block", 2),
    ("block", 4),
    ("block", 6),
    ("block", 10),
    ("block", 1),
    ("full", 4),
    ("full", 2),
]


@pytest.mark.parametrize("name, block_size", RULES)
def test_scan_equals_the_plain_loop_in_float64(name, block_size):
    """Values, reports and gradients of everything, for each remat policy; 4 and 6 leave a short last block."""
    with jax.enable_x64(True):
        rule = make_rule(name, block_size, 1e-6)
        stacks, sites, embedding, context = draw(rule)
        expected = value_and_gradients(functools.partial(looped, rule, context), stacks, sites, embedding)
        for remat in ("none", "dots", "full"):
            form = functools.partial(scanned, rule, context, remat)
            assert worst(value_and_gradients(form, stacks, sites, embedding), expected) < 1e-12


@pytest.mark.parametrize("name, block_size", [("block", 4), ("full", 4)])
def test_scan_equals_the_plain_loop_in_float32(name, block_size):
    rule = make_rule(name, block_size, 1e-6)
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    results = []
    for form in (functools.partial(scanned, rule, context, "none"), functools.partial(looped, rule, context)):
        results.append(value_and_gradients(form, stacks, sites, embedding))
    assert worst(*results) < 2e-6  # ten sublayers; a single operator is held to 1e-6


def test_full_equals_block_of_one_sublayer():
    """By the plain loops too: the one for Full and the one for blocks of size 1 share no schedule."""
    with jax.enable_x64(True):
        full, block = make_rule("full", 6, 1e-6), make_rule("block", 1, 1e-6)
        stacks, sites, embedding, context = draw(full)
        run = jax.jit(lambda *arguments: [scanned(rule, context, "none", *arguments)[0] for rule in (full, block)])
        assert worst(*run(stacks, sites, embedding)) < 1e-13


def test_first_query_gets_exactly_zero_gradient():
    rule = make_rule("block", 4, 1e-6)
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    loss = lambda sites: (scanned(rule, context, "none", stacks, sites, embedding)[0] ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(sites)
    assert np.all(np.asarray(gradient.query[0]) == 0)
    assert np.all(np.asarray(gradient.key_scale[0]) == 0)
    assert np.all(np.abs(np.asarray(gradient.query[1:])).max(1) > 0)


def test_parameters_and_bank_are_not_saved_per_block():
    """With everything kept, what the scan saves has neither a copy of the bank nor one of the weights a block."""
    rule = make_rule("block", 2, 1e-6)
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    _, pullback = jax.vjp(functools.partial(scanned, rule, context, "none"), stacks, sites, embedding)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    bank, weights = (6, *embedding.shape), (5, WIDTH, WIDTH)
    assert shapes.count(bank) <= 2  # the final bank, for the blocks and for the readout
    assert shapes.count(weights) <= 2  # the two stacks themselves
    assert not any(shape[1:] == bank for shape in shapes)


@pytest.mark.parametrize("name, again", [("residual", 1), ("full", 0)])
def test_remat_policies_keep_less_and_less_and_nothing_in_the_bank_is_computed_again(name, again):
    """Of two sublayers of a block the first is multiplied again, unless its output is a source by itself."""
    rule, kept, products = make_rule(name, 2, 1e-6), [], []
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    for remat in ("none", "dots", "full"):
        form = functools.partial(scanned, rule, context, remat)
        pullback = jax.eval_shape(lambda *own, form=form: jax.vjp(form, *own)[1], stacks, sites, embedding)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pullback)))
        gradient = jax.grad(lambda *own, form=form: form(*own)[0].sum(), argnums=(0, 1, 2))
        program = equations(jax.make_jaxpr(gradient)(stacks, sites, embedding))
        of_sublayers = [each for each in program if each.params.get("precision", HIGHEST) is None]
        products.append(len(of_sublayers))
    assert kept[0] > kept[1] > kept[2]
    assert products == [6, 6, 6 + again]


def test_shared_parameters_are_refused():
    rule = make_rule("residual", 2, 1e-6)
    stacks, sites, embedding, context = draw(rule, jnp.float32)
    segments = [Segment(("tanh", "tanh"), np.array([[0, 1], [1, 2]]))]
    with pytest.raises(ValueError, match="used twice"):
        depth_scan(rule, segments, call, stacks, sites, embedding, None, context)


def test_plan_is_cut_into_runs_of_equal_blocks():
    kinds = ["kda", "dense"] + ["kda", "moe"] * 2 + ["mla", "moe"] + (["kda", "moe"] * 3 + ["mla", "moe"]) * 2
    segments = cut(kinds, 8)
    assert [(segment.kinds[1], segment.slots.shape) for segment in segments] == [("dense", (1, 8)), ("moe", (2, 8))]
    np.testing.assert_array_equal(segments[1].slots[1], [6, 7, 7, 8, 8, 9, 2, 10])
    assert [s.slots.shape for s in cut(["a", "b"] * 5, 4)] == [(2, 4), (1, 2)]
    assert isinstance(segments[0], Segment)
