"""The training state: everything that changes from one step to the next, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnres_jax.config import Config
from attnres_jax.models import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and replaces. Fields are `Any`: JAX rebuilds the class around shapes, paths and masks too."""

    step: Any
    """int32 scalar: steps done."""
    model: Any
    """The model, an nnx module used as a pytree of parameters."""
    opt_state: Any
    """What optax keeps."""
    rng: Any
    """The run's typed random key. It stays as it is: whoever needs randomness folds `step` into it."""


def new_state(config: Config, optimizer: optax.GradientTransformation, model: Decoder | None = None) -> TrainState:
    """The state before the first step, of a fresh model if none is given.

    Call it under `jax.jit` (born on the device) or `jax.eval_shape` (free).
    """
    model = model or Decoder(config.model, rngs=nnx.Rngs(config.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32), model=model, opt_state=optimizer.init(model), rng=jax.random.key(config.seed)
    )
