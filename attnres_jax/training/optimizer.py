"""AdamW: decay on matrices only, linear warm-up, cosine decay, clipping by the global norm."""

import optax

from attnres_jax.config import OptimizerConfig
from attnres_jax.training.parameters import decay_mask


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
    """Clipping, then AdamW (decoupled decay, scaled by the learning rate) as one optax transformation."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
