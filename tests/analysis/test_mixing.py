"""Measures of mixing matrices against closed forms, hand-made values and the plain loops of the rules."""

import jax
import numpy as np
import pytest
from toy_stacks import SUBLAYERS, draw, plain

from attnres_jax.analysis import MEASURES, depth_mixing, effective_rank
from attnres_jax.depth import Options, make_rule

SITES = 9


def test_residual_in_closed_form():
    mixing = depth_mixing(np.tri(SITES))
    count = np.arange(1, SITES + 1)
    np.testing.assert_allclose(mixing.entropy, np.log(count), atol=1e-15)
    assert np.isnan(mixing.evenness[0])
    np.testing.assert_allclose(mixing.evenness[1:], 1)
    np.testing.assert_allclose(mixing.sharpness, 1 / count)
    np.testing.assert_allclose(mixing.embedding_share, 1 / count)
    assert mixing.separable_rank == pytest.approx(1, rel=1e-6)
    # The singular values of a triangle of ones.
    values = 1 / (2 * np.sin((2 * count - 1) * np.pi / (4 * SITES + 2)))
    values /= values.sum()
    assert mixing.effective_rank == pytest.approx(np.exp(-(values * np.log(values)).sum()))
    np.testing.assert_array_equal(mixing.relative, np.where(np.tri(SITES), 1, np.nan))


def test_sites_that_read_the_newest_output_alone():
    mixing = depth_mixing(np.eye(SITES))
    np.testing.assert_array_equal(mixing.entropy, 0)
    np.testing.assert_array_equal(mixing.sharpness, 1)
    np.testing.assert_array_equal(mixing.embedding_share, [1] + [0] * (SITES - 1))
    assert mixing.separable_rank == pytest.approx(1)
    # Each row over its mean: the singular values are 1 to 9.
    values = np.arange(1, SITES + 1) / 45
    assert mixing.effective_rank == pytest.approx(np.exp(-(values * np.log(values)).sum()))
    assert effective_rank(np.eye(SITES)) == pytest.approx(SITES)


def test_signs_count_by_size_and_rows_without_weights_as_nothing():
    mixing = depth_mixing(np.array([[2.0, 9.0, 9.0], [0.0, 0.0, np.nan], [-1.0, 2.0, -1.0]]))
    blank = np.nan
    np.testing.assert_allclose(mixing.matrix, [[2, blank, blank], [0, 0, blank], [-1, 2, -1]])
    np.testing.assert_allclose(mixing.shares, [[1, blank, blank], [0, 0, blank], [0.25, 0.5, 0.25]])
    np.testing.assert_allclose(mixing.relative, [[1, blank, blank], [0, 0, blank], [-0.75, 1.5, -0.75]])
    np.testing.assert_allclose(mixing.entropy, [0, 0, 1.5 * np.log(2)])
    np.testing.assert_allclose(mixing.evenness, [np.nan, 0, 1.5 * np.log(2) / np.log(3)])
    np.testing.assert_allclose(mixing.sharpness, [1, 0, 0.5])
    np.testing.assert_allclose(mixing.embedding_share, [1, 0, 0.25])
    summary = mixing.summary()
    assert list(summary) == list(MEASURES)
    assert summary["sharpness"] == pytest.approx(0.25) and summary["embedding_share"] == pytest.approx(0.125)
    assert summary["effective_rank"] == mixing.effective_rank


def test_the_scale_of_a_row_does_not_count():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(SITES, SITES))
    one, two = depth_mixing(matrix), depth_mixing(matrix * rng.uniform(0.1, 10, (SITES, 1)))
    np.testing.assert_allclose(one.relative, two.relative)
    for key, value in one.summary().items():
        assert two.summary()[key] == pytest.approx(value)


def test_what_is_not_finite_is_measured_as_that():
    matrix = np.tri(SITES)
    matrix[3, 1] = np.inf
    with np.errstate(invalid="ignore"):
        mixing = depth_mixing(matrix)
    assert np.isnan(mixing.effective_rank) and np.isnan(mixing.separable_rank) and np.isnan(mixing.entropy[3])
    assert effective_rank(np.zeros((2, 3))) == 0


@pytest.mark.parametrize(
    "name, block_size, options, rank",
    [
        ("residual", 2, {}, 1),
        ("rezero", 2, {}, 1),
        ("layerscale", 2, {}, 1),
        ("lambdas", 2, {}, 2),
        ("hyper_connections", 2, {"streams": 2}, 2),
        ("mhc", 2, {"streams": 2}, 2),
        ("mhc_lite", 2, {"streams": 2}, 2),
        ("block", 2, {}, 3),  # the embedding, a finished block, and the own one or a second
        ("full", 2, {}, (SUBLAYERS + 2) // 2),
    ],
)
def test_as_many_streams_cross_a_depth_as_the_rule_has(name, block_size, options, rank):
    """The rank of a token's weights from any site on, of what this site can read; the effective rank is no larger."""
    with jax.enable_x64(True):
        rule = make_rule(name, block_size, 1e-6, Options(**options))
        stacks, sites, embedding, context = draw(rule)
        rows = plain(rule, context, stacks, sites, embedding).matrix
    matrix = np.zeros((SUBLAYERS + 1, SUBLAYERS + 1))
    for site, row in enumerate(rows):
        matrix[site, : site + 1] = row[:, 0, 0]
    crossing = [np.linalg.matrix_rank(matrix[site:, : site + 1], 1e-9) for site in range(len(matrix))]
    assert max(crossing) == rank
    assert depth_mixing(matrix).separable_rank < rank + 1e-6
