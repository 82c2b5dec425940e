"""The training step: gradients summed over micro-batches, one update, metrics; jitted, its state donated."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from attnres_jax.config import DataConfig, PipelineConfig, TrainingConfig
from attnres_jax.evaluation.perplexity import Batch, bits_per_byte
from attnres_jax.layers import RouterReport, update_bias
from attnres_jax.layers.router import max_violation
from attnres_jax.models import parameter_name
from attnres_jax.parallel import batch_sharding, pipeline_gradients
from attnres_jax.training.loss import objective
from attnres_jax.training.parameters import group_norms
from attnres_jax.training.state import TrainState

DEFAULT_PIPELINE = PipelineConfig()
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]


def make_train_step(
    config: TrainingConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shapes: TrainState | None = None,
    pipeline: PipelineConfig = DEFAULT_PIPELINE,
) -> TrainStep:
    """The jitted `step(state, batch, token_bytes) -> (state, metrics)`; `state` is donated.

    `batch` holds arrays [B, T]. Metrics are float32 scalars of this step: `loss` (nats per token, without the z-loss),
    `bits_per_byte`, `learning_rate`, `grad_norm` (global, before clipping), norms per group, and `finite`: whether the
    loss, every gradient and every updated parameter is. With experts also `router/...`, means over the layers: the two
    losses unscaled, how far the busiest expert, and the busiest of the devices that share them out, is above an even
    load, the share of idle experts, and that of assignments that no expert computed. After the optimizer's update the
    score corrections follow the load, until `router_bias_until` of the steps are done.

    `shapes` with shardings on a mesh: the new state lies where they say, and metrics are whole on every device. Where
    that mesh has several stages, the micro-batches go through them as `pipeline` says.
    """
    bias_steps = math.ceil(config.router_bias_until * config.steps)

    places = None
    if shapes is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        places = shardings, NamedSharding(shardings.step.mesh, PartitionSpec())

    @partial(jax.jit, donate_argnums=0, out_shardings=places)
    def step(state: TrainState, batch: Batch, token_bytes: Any) -> tuple[TrainState, dict[str, Any]]:
        total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        inputs = state.model, batch, token_bytes, total_weight, config
        staged = jax.sharding.get_abstract_mesh().shape.get("stage", 1) > 1
        gradients, sums = pipeline_gradients(*inputs, pipeline) if staged else accumulate(*inputs)
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
        if "router" in sums:
            rate = jnp.where(state.step < bias_steps, config.router_bias_rate, 0.0)
            parts = 1 if places is None else dict(places[1].mesh.shape).get("expert", 1)
            model, router = balance(model, sums["router"], rate, parts)
            metrics |= router
        for prefix, tree in (("param_norm", model), ("grad_norm", gradients), ("update_norm", updates)):
            metrics |= group_norms(prefix, tree)
        metrics["finite"] = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
        return TrainState(state.step + 1, model, opt_state, state.rng), metrics

    return step


BATCH_DTYPES = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), jnp.int32) | {"weights": jnp.float32}
"""Of the arrays [B, T] of a batch."""


def batch_shapes(config: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch on the mesh, over all processes."""
    shape = config.batch_size, config.sequence_length
    place = batch_sharding(mesh, shape)
    return {key: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for key, dtype in BATCH_DTYPES.items()}


def accumulate(
    model: Any, batch: Batch, token_bytes: Any, total_weight: Any, config: TrainingConfig
) -> tuple[Any, dict[str, Any]]:
    """The gradient of the objective over the whole batch, and its sums, one micro-batch at a time."""

    def share(micro_batch: Batch) -> tuple[Any, dict[str, Any]]:
        return jax.grad(objective, has_aux=True)(model, micro_batch, token_bytes, total_weight, config)

    def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, share(micro_batch)), None

    split = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), dict(batch))
    shapes = jax.eval_shape(share, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # A single micro-batch is unrolled: no loop is left in the program.
    return jax.lax.scan(add, zeros, split, unroll=config.accumulation == 1)[0]


def balance(
    model: Any, sums: RouterReport, rate: Float[Array, ""], parts: int = 1
) -> tuple[Any, dict[str, Float[Array, ""]]]:
    """The model with its score corrections moved towards an even load, and the routers' metrics.

    Args:
      model: with experts.
      sums: the routers' reports times their numbers of tokens, summed over the batch.
      rate: of the correction, see `update_bias`.
      parts: into how many parts the experts are shared out, one after the other.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    load = sums.load / tokens[:, None]

    def move(path: tuple[Any, ...], leaf: Array) -> Array:
        if parameter_name(path) != "sublayers.moe.correction_bias":
            return leaf
        return update_bias(leaf, load, rate).astype(leaf.dtype)

    metrics = {
        "router/balance_loss": jnp.mean(sums.balance_loss / tokens),
        "router/z_loss": jnp.mean(sums.z_loss / tokens),
        "router/max_violation": jnp.mean(max_violation(load)),
        "router/device_violation": jnp.mean(max_violation(jnp.sum(load.reshape(len(load), parts, -1), axis=-1))),
        "router/idle": jnp.mean(load == 0, dtype=jnp.float32),
        "router/dropped": jnp.mean(sums.dropped / tokens),
    }
    return jax.tree_util.tree_map_with_path(move, model), metrics
