"""Held-out loss against a count by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax.evaluation import HeldOut, evaluate
from attnres_jax.evaluation.perplexity import token_nll

TABLE = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], np.float32))


class Table(dict):
    """A model whose prediction depends on the token alone."""

    def __call__(self, tokens, segment_ids, positions):
        return self["logits"][tokens]


jax.tree_util.register_pytree_node(Table, lambda t: ((t["logits"],), None), lambda _, leaves: Table(logits=leaves[0]))
MODEL = Table(logits=jnp.asarray(TABLE) + 7.0)  # softmax does not mind the 7


def batch(inputs, targets, weights):
    arrays = {"inputs": inputs, "targets": targets, "segment_ids": inputs, "positions": inputs}
    arrays = {key: np.array(value, np.int32) for key, value in arrays.items()}
    return arrays | {"weights": np.array(weights, np.float32)}


BATCHES = [
    batch([[0, 1], [2, 0]], [[0, 1], [2, 1]], [[1, 1], [1, 0]]),
    batch([[1, 1], [0, 0]], [[2, 0], [0, 0]], [[1, 1], [0, 0]]),
]
TOKEN_BYTES = np.array([1, 2, 5], np.int32)


@pytest.mark.parametrize("splits", [1, 2])
def test_loss_perplexity_and_bits_per_byte(splits):
    result = evaluate(MODEL, BATCHES, TOKEN_BYTES, splits=splits)
    nats = -math.log(0.5 * 0.8 * 0.4 * 0.1 * 0.1)
    assert result.tokens == 5
    assert result.loss == pytest.approx(nats / 5, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 5), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (1 + 2 + 5 + 5 + 1), rel=1e-6)


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error():
    assert HeldOut(loss=1e4, bits_per_byte=1.0, tokens=1).perplexity == math.inf


def test_log_softmax_is_float32_whatever_the_logits_are():
    logits = jnp.array([[300.0, 301.0, -2.0]], jnp.bfloat16)
    nll, log_z = token_nll(logits, jnp.array([0]))
    exact = np.asarray(logits.astype(jnp.float32), np.float64)
    expected = np.log(np.exp(exact - 300).sum()) + 300
    assert nll.dtype == log_z.dtype == jnp.float32
    np.testing.assert_allclose(log_z, [expected], rtol=1e-7)
    np.testing.assert_allclose(nll, [expected - exact[0, 0]], rtol=1e-5)
