"""The training step: gradients summed over micro-batches, one update, metrics; jitted, its state donated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnres_jax.config import DataConfig, TrainingConfig
from attnres_jax.evaluation.perplexity import Batch, bits_per_byte
from attnres_jax.training.loss import SUMS, objective
from attnres_jax.training.parameters import group_norms
from attnres_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]


def make_train_step(
    config: TrainingConfig, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> TrainStep:
    """The jitted `step(state, batch, token_bytes) -> (state, metrics)`; `state` is donated.

    `batch` holds arrays [B, T]. Metrics are float32 scalars of this step: `loss` (nats per token, without the z-loss),
    `bits_per_byte`, `learning_rate`, `grad_norm` (global, before clipping), norms per group, and `finite`: whether the
    loss, every gradient and every updated parameter is.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, token_bytes: Any) -> tuple[TrainState, dict[str, Any]]:
        total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        gradients, sums = accumulate(state.model, batch, token_bytes, total_weight, config.accumulation, config.z_loss)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {
            "loss": sums["nll"] / total_weight,
            "bits_per_byte": bits_per_byte(sums["nll"], sums["bytes"]),
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(gradients),
        }
        if config.z_loss:
            metrics["z_loss"] = config.z_loss * sums["log_z_squared"] / total_weight
        for prefix, tree in (("param_norm", model), ("grad_norm", gradients), ("update_norm", updates)):
            metrics |= group_norms(prefix, tree)
        metrics["finite"] = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
        return TrainState(state.step + 1, model, opt_state, state.rng), metrics

    return step


def batch_shapes(config: DataConfig, processes: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one process's batch."""
    shape = config.batch_size // processes, config.sequence_length
    integers = ("inputs", "targets", "segment_ids", "positions")
    return {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key in integers} | {
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32)
    }


def accumulate(
    model: Any, batch: Batch, token_bytes: Any, total_weight: Any, micro_batches: int, z_loss: float
) -> tuple[Any, dict[str, Any]]:
    """The gradient of the objective over the whole batch, and its sums, one micro-batch at a time."""

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        def share(model: Any) -> Any:
            return objective(model, micro_batch, token_bytes, total_weight, z_loss)

        return jax.tree.map(jnp.add, total, jax.grad(share, has_aux=True)(model)), None

    zeros = jax.tree.map(jnp.zeros_like, model), dict.fromkeys(SUMS, jnp.zeros(()))
    split = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), dict(batch))
    # A single micro-batch is unrolled: no loop is left in the program.
    return jax.lax.scan(add, zeros, split, unroll=micro_batches == 1)[0]
