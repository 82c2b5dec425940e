"""The training objective: weighted cross-entropy in float32, with an optional z-loss, and what routers add to it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.config import TrainingConfig
from attnres_jax.evaluation.perplexity import Batch, token_nll
from attnres_jax.layers.router import weigh

SUMS = ("nll", "log_z_squared", "bytes")
"""What the objective also returns: weighted sums of nats, squared log-partitions, and bytes of text predicted."""


def objective(
    model: Any, batch: Batch, token_bytes: Any, total_weight: Any, config: TrainingConfig
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """This batch's share of the objective, and sums for the metrics.

    sum_i w_i (nll_i + z_loss * log_z_i^2) / total_weight, and as a mean over the layers with experts the routers'
    losses, of which this batch has the share sum_i w_i / total_weight. With `total_weight` taken over all micro-batches
    of a step, the shares add up to the objective of the whole batch, however the weights fall on the micro-batches.

    Returns:
      The share, and the sums that `SUMS` names; with experts also `router`: their report times its number of tokens.
    """
    logits, reports = model.with_reports(batch["inputs"], batch["segment_ids"], batch["positions"])
    nll, log_z = token_nll(logits, batch["targets"])
    weights = batch["weights"]
    text_bytes = token_bytes[batch["targets"]]
    sums = {key: jnp.sum(weights * term) for key, term in zip(SUMS, (nll, jnp.square(log_z), text_bytes), strict=True)}
    total = sums["nll"] + config.z_loss * sums["log_z_squared"]
    if reports is not None:
        balance, z_loss = jnp.mean(reports.balance_loss), jnp.mean(reports.z_loss)
        total += jnp.sum(weights) * (config.router_balance_loss * balance + config.router_z_loss * z_loss)
        sums["router"] = weigh(reports)
    return total / total_weight, sums
