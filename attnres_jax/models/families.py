"""The model families by `model_type`, and their presets by name."""

import dataclasses

from attnres_jax.config import DepthConfig, ModelConfig, validate_model
from attnres_jax.config.checks import one_of
from attnres_jax.errors import ConfigError
from attnres_jax.models.deepseek_v3 import DEEPSEEK_V3
from attnres_jax.models.family import Family, NoPlaceError
from attnres_jax.models.kimi_k3 import KIMI_K3
from attnres_jax.models.kimi_linear import KIMI_LINEAR
from attnres_jax.models.llama import LLAMA
from attnres_jax.models.qwen3 import QWEN3
from attnres_jax.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (QWEN3, LLAMA, QWEN3_MOE, DEEPSEEK_V3, KIMI_LINEAR, KIMI_K3)
}
"""Where several can hold a model, the first is the one it is exported as."""

PRESETS: dict[str, Family] = {name: family for family in FAMILIES.values() for name in family.presets}
"""The family of each preset."""


def preset(name: str, residual: str = "residual", block_size: int = 0) -> ModelConfig:
    """The configuration of a released model under any depth rule.

    Args:
      name: a key of `PRESETS`.
      residual: the depth rule.
      block_size: sublayers in a block; 0: about eight blocks.

    Raises:
      ConfigError: for an unknown name or rule.
    """
    one_of("preset", name, PRESETS)
    family = PRESETS[name]
    config = family.read(family.presets[name].settings)
    depth = DepthConfig(rule=residual, block_size=block_size or default_block_size(config.num_layers))
    config = dataclasses.replace(config, depth=depth)
    validate_model(config)
    return config


def default_block_size(num_layers: int) -> int:
    """Sublayers in a block of whole layers, for as nearly eight blocks as there can be (paper, section 5)."""
    layers = min(range(1, num_layers + 1), key=lambda layers: abs(-(-num_layers // layers) - 8))
    return 2 * layers


def family_of(config: ModelConfig) -> Family:
    """The family that a model is exported as.

    Raises:
      ConfigError: if none can hold it, with what keeps it from the nearest one.
    """
    errors = []
    for family in FAMILIES.values():
        try:
            family.write(config)
        except ConfigError as error:
            errors.append(error)
        else:
            return family
    raise min(errors, key=_distance)


def _distance(error: ConfigError) -> tuple[bool, bool, int]:
    """How far a model is from a family: a kind of layer is farther than any number of settings."""
    lost = error.lost if isinstance(error, NoPlaceError) else {}
    return not lost, not lost.keys().isdisjoint(("attention_layers", "mlp_layers")), len(lost)
