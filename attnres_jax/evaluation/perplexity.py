"""Held-out loss: nats per token, perplexity and bits per byte of a model on fixed batches."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Batch = Mapping[str, Any]
"""Arrays [B, T]: inputs, targets, segment_ids, positions (int) and weights (float32)."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A model's loss on held-out text."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    bits_per_byte: float
    """The same likelihood in bits per byte of text: comparable between tokenizers."""
    tokens: int
    """Tokens predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Any, batches: Iterable[Batch], token_bytes: Int[Array | np.ndarray, "V"], *, splits: int = 1
) -> HeldOut:
    """The loss of `model` on `batches`, in one jitted call a batch.

    Args:
      model: called as `model(inputs, segment_ids, positions)`, giving logits [B, T, V].
      batches: arrays [B, T]; targets of weight 0 do not count.
      token_bytes: bytes of text that each token stands for.
      splits: parts a batch is computed in, one after the other, as gradient accumulation does; it divides B.
    """
    totals = np.zeros(3)
    for sums in [_batch_sums(model, dict(batch), token_bytes, splits) for batch in batches]:
        totals += np.asarray(sums, np.float64)
    nll, weight, text_bytes = totals
    return HeldOut(loss=float(nll / weight), bits_per_byte=bits_per_byte(nll, text_bytes), tokens=int(weight))


def bits_per_byte(nll: Any, text_bytes: Any) -> Any:
    """Nats over bytes, in bits; no text counts as one byte."""
    return nll / math.log(2) / (text_bytes + (text_bytes == 0))


def token_nll(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Negative log-likelihood of the targets in nats, and the log-partition of the softmax; float32 throughout."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


@partial(jax.jit, static_argnames="splits")
def _batch_sums(model: Any, batch: dict[str, Any], token_bytes: Any, splits: int) -> Float[Array, "3"]:
    """Sums over a batch: nats, weights, bytes of text."""

    def part_sums(part: dict[str, Any]) -> Float[Array, "3"]:
        nll, _ = token_nll(model(part["inputs"], part["segment_ids"], part["positions"]), part["targets"])
        weights = part["weights"]
        return jnp.stack([jnp.sum(nll * weights), jnp.sum(weights), jnp.sum(token_bytes[part["targets"]] * weights)])

    parts = jax.tree.map(lambda x: x.reshape(splits, -1, *x.shape[1:]), batch)
    return jnp.sum(jax.lax.map(part_sums, parts), axis=0)
