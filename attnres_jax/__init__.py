"""Attention Residuals in JAX: sublayers that choose, by a softmax over depth, what they read from earlier ones."""

from flax import nnx

from attnres_jax.config import Config, ModelConfig, load_config, validate_model
from attnres_jax.models import Decoder

__version__ = "0.1.0"
__all__ = ["Config", "Decoder", "ModelConfig", "build_model", "load_config"]


def build_model(config: ModelConfig, *, rngs: nnx.Rngs) -> Decoder:
    """A freshly drawn model; `model(tokens) -> logits`.

    Raises:
      ConfigError: if the configuration is impossible.
    """
    validate_model(config)
    return Decoder(config, rngs=rngs)
