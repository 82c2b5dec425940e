"""The training objective: weighted cross-entropy in float32, with an optional z-loss."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.evaluation.perplexity import Batch, token_nll


def objective(
    model: Any, batch: Batch, token_bytes: Any, total_weight: Any, z_loss: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This batch's share of the objective, and sums for the metrics.

    sum_i w_i (nll_i + z_loss * log_z_i^2) / total_weight. With `total_weight` taken over all micro-batches of a step,
    the shares add up to the objective of the whole batch, however the weights fall on the micro-batches.

    Returns:
      The share, and the weighted sums `nll` (nats), `log_z_squared` and `bytes` (of text predicted).
    """
    logits = model(batch["inputs"], batch["segment_ids"], batch["positions"])
    nll, log_z = token_nll(logits, batch["targets"])
    weights = batch["weights"]
    sums = {
        "nll": jnp.sum(weights * nll),
        "log_z_squared": jnp.sum(weights * jnp.square(log_z)),
        "bytes": jnp.sum(weights * token_bytes[batch["targets"]]),
    }
    return (sums["nll"] + z_loss * sums["log_z_squared"]) / total_weight, sums
