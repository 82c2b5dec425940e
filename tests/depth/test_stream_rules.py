"""Rules that keep everything in a stream: their starts, and that their weights are the papers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_stacks import SUBLAYERS, WIDTH, draw, plain, scanned

from attnres_jax.depth.hyper_connections import HyperConnections
from attnres_jax.depth.lambdas import Lambdas
from attnres_jax.depth.layerscale import LayerScale, initial_gain
from attnres_jax.depth.mhc import ManifoldHyperConnections, sinkhorn
from attnres_jax.depth.mhc_lite import LiteHyperConnections, permutations
from attnres_jax.depth.options import Options
from attnres_jax.depth.residual import Residual
from attnres_jax.depth.rezero import ReZero

EPS = 1e-6
STREAMS = [HyperConnections, ManifoldHyperConnections, LiteHyperConnections]


def make(rule, block_size=4, streams=3):
    return rule(block_size, EPS, Options(streams=streams))


def mixing(made, sites, sublayer, streams):
    """As one program."""
    return jax.jit(lambda sites, streams: made.mixing(sites, sublayer, streams))(sites, streams)


@pytest.mark.parametrize("rule", [Lambdas, *STREAMS])
@pytest.mark.parametrize("streams", [2, 3, 4])
def test_start_is_the_residual_baseline(rule, streams):
    """Every sublayer reads the residual stream; the head reads the sum of n equal ones."""
    with jax.enable_x64(True):
        made, baseline = make(rule, streams=streams), make(Residual)
        stacks, _, embedding, context = draw(baseline)
        sites = jax.tree.map(lambda x: x.astype(jnp.float64), made.init_sites(SUBLAYERS, WIDTH))
        run, expected = (plain(r, context, stacks, s, embedding) for r, s in ((made, sites), (baseline, None)))
        factor = streams if rule in STREAMS else 1
        for h, residual in zip(run.inputs[:-1], expected.inputs[:-1], strict=True):
            np.testing.assert_allclose(h, residual, rtol=1e-5, atol=1e-6)  # biases are drawn up in float32
        np.testing.assert_allclose(run.inputs[-1], factor * expected.inputs[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", STREAMS)
def test_streams_part_after_the_start(rule):
    """What is written into equal streams has different gradients: training can make use of all."""
    made = make(rule)
    stacks, sites, embedding, context = draw(made, jnp.float32, perturb=0)
    cubes = lambda sites: (scanned(made, context, "none", stacks, sites, embedding)[0] ** 3).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(cubes))(sites)
    post = gradient.beta[...] if rule is HyperConnections else gradient.bias[...][:, 3:6]
    assert np.ptp(np.asarray(post[0])) > 1e-3
    assert all(np.any(np.asarray(leaf) != 0) for name, leaf in flat(gradient) if "gate" not in name)


def flat(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_rezero_starts_as_the_identity_and_layerscale_near_it():
    for rule in (ReZero, LayerScale):
        made = make(rule)
        stacks, sites, embedding, context = draw(made, jnp.float32, perturb=0)
        run = plain(made, context, stacks, sites, embedding)
        expected = embedding + sum(initial_gain(SUBLAYERS) * y for y in run.outputs) * (rule is LayerScale)
        np.testing.assert_allclose(run.inputs[-1], expected, atol=1e-6)
    assert [initial_gain(2 * layers) for layers in (12, 18, 24, 36)] == [0.1, 0.1, 1e-5, 1e-6]


def test_hyper_connections_weights_are_the_papers():
    """One token, in numpy: static part plus gate * tanh(norm(H) W)."""
    with jax.enable_x64(True):
        made = make(HyperConnections)
        _, sites, _, _ = draw(made)
        streams = np.asarray(jax.random.normal(jax.random.key(7), (3, WIDTH), jnp.float64))
        pre, post, carry = mixing(made, sites, 2, jnp.asarray(streams))
        norm = streams / np.sqrt((streams**2).mean(1, keepdims=True) + EPS)
        take = lambda name: np.asarray(getattr(sites, name)[...])[2]  # noqa: E731
        alpha = take("alpha") + take("alpha_gate") * np.tanh(norm @ take("alpha_projection"))
        np.testing.assert_allclose(pre, alpha[:, 0], rtol=1e-12)
        np.testing.assert_allclose(carry, alpha[:, 1:].T, rtol=1e-12)
        beta = take("beta") + take("beta_gate") * np.tanh(norm @ take("beta_projection"))
        np.testing.assert_allclose(post, beta, rtol=1e-12)


@pytest.mark.parametrize("rule", [ManifoldHyperConnections, LiteHyperConnections])
def test_manifold_weights_are_the_papers(rule):
    """One token, in numpy: logits from the flattened, normalised streams; Sinkhorn by division, or permutations."""
    with jax.enable_x64(True):
        made = make(rule)
        _, sites, _, _ = draw(made)
        streams = np.asarray(jax.random.normal(jax.random.key(7), (3, WIDTH), jnp.float64))
        pre, post, carry = mixing(made, sites, 2, jnp.asarray(streams))
        x = streams.ravel() / np.sqrt((streams**2).mean() + EPS)
        gate, bias, projection = (np.asarray(getattr(sites, name)[...])[2] for name in ("gate", "bias", "projection"))
        logits = np.repeat(gate, [3, 3, len(bias) - 6]) * (x @ projection) + bias
        np.testing.assert_allclose(pre, 1 / (1 + np.exp(-logits[:3])), rtol=1e-12)
        np.testing.assert_allclose(post, 2 / (1 + np.exp(-logits[3:6])), rtol=1e-12)
        expected = np.exp(logits[6:])
        if rule is LiteHyperConnections:
            expected = sum(w * p for w, p in zip(expected / expected.sum(), permutations(3), strict=True))
        else:
            expected = expected.reshape(3, 3)
            for _ in range(20):
                expected = expected / expected.sum(0, keepdims=True)
                expected = expected / expected.sum(1, keepdims=True)
        np.testing.assert_allclose(carry, expected, rtol=1e-12)


@pytest.mark.parametrize("rule, tolerance", [(ManifoldHyperConnections, 1e-3), (LiteHyperConnections, 1e-6)])
def test_mixing_is_doubly_stochastic(rule, tolerance):
    """mHC's rows exactly, its columns as far as 20 steps go; mHC-lite's both exactly."""
    made = make(rule)
    _, sites, _, _ = draw(made, jnp.float32)
    streams = jax.random.normal(jax.random.key(3), (3, 2, 5, WIDTH))
    carry = mixing(made, sites, 1, streams).carry
    assert carry.shape == (3, 3, 2, 5)
    assert float(carry.min()) >= 0
    np.testing.assert_allclose(carry.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(carry.sum(0), 1, atol=tolerance)


def test_sinkhorn_survives_extreme_logits():
    logits = jnp.array([[300.0, -300.0], [-300.0, 300.0]])
    value, gradient = jax.value_and_grad(lambda x: sinkhorn(x)[0, 0])(logits)
    np.testing.assert_allclose(value, 1)
    assert np.all(np.isfinite(np.asarray(gradient)))


def test_permutations_are_all_and_the_identity_is_first():
    matrices = permutations(4)
    assert len(np.unique(matrices.reshape(-1, 16), axis=0)) == 24
    np.testing.assert_array_equal(matrices[0], np.eye(4))
    np.testing.assert_array_equal(matrices.sum(1), 1)
    np.testing.assert_array_equal(matrices.sum(2), 1)
