"""Training: the loop, its step, optimizer, checkpoints and records."""

from attnres_jax.training.checkpoints import (
    ChangedTextError,
    CheckpointError,
    restore_model,
    restore_text,
)
from attnres_jax.training.compilation import enable_compilation_cache
from attnres_jax.training.export import export_run
from attnres_jax.training.flops import forward_flops_per_token, training_flops_per_token
from attnres_jax.training.host_memory import retain_host_memory
from attnres_jax.training.loop import train
from attnres_jax.training.meter import NonFiniteError
from attnres_jax.training.optimizer import learning_rate_schedule, make_optimizer
from attnres_jax.training.state import TrainState, new_state
from attnres_jax.training.step import make_train_step
from attnres_jax.training.workdir import WorkdirError

__all__ = [
    "ChangedTextError",
    "CheckpointError",
    "NonFiniteError",
    "TrainState",
    "WorkdirError",
    "enable_compilation_cache",
    "export_run",
    "forward_flops_per_token",
    "learning_rate_schedule",
    "make_optimizer",
    "make_train_step",
    "new_state",
    "restore_model",
    "restore_text",
    "retain_host_memory",
    "train",
    "training_flops_per_token",
]
