"""AdamW with decay and learning rate by parameter group, linear warm-up, cosine decay, clipping by the global norm."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from attnres_jax.config import OptimizerConfig
from attnres_jax.models import parameter_name
from attnres_jax.training.parameters import learning_rate_multiplier, weight_decay


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ..., steps - 1.

    Rises in equal parts from learning_rate / (warmup_steps + 1), so that no update is wasted on a rate of zero, to
    learning_rate at update warmup_steps, then falls along a cosine to final_learning_rate at the last update.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps - 1, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW (decoupled decay, scaled by the learning rate) as one optax transformation.

    Decay and a group's share of the learning rate are looked up by name and keep no state: what is saved is Adam's
    moments and the two counts, whatever the groups.
    """

    def decay(name: str, update: Any, param: Any) -> Any:
        rate = weight_decay(name, config)
        return update + rate * param if rate else update

    def multiply(name: str, update: Any, _: Any) -> Any:
        multiplier = learning_rate_multiplier(name, config)
        return update if multiplier == 1 else multiplier * update

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            _by_name(decay),
            optax.scale_by_learning_rate(schedule),
            _by_name(multiply),
        ),
    )


def _by_name(change: Callable[[str, Any, Any], Any]) -> optax.GradientTransformation:
    """`change(name, update, param)` on every leaf."""
    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
            lambda path, update, param: change(parameter_name(path), update, param), updates, params
        )
    )
