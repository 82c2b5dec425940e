"""Parameters by name, and how many of them a token meets."""

import math
from typing import Any

import jax

from attnres_jax.config import ModelConfig


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by dotted name, as in `sublayers.gqa.query.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {parameter_name(path): leaf for path, leaf in leaves}


def parameter_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a dotted name; the `.value` of an nnx variable is left out."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def activated_parameters(config: ModelConfig, shapes: Any) -> int:
    """The parameters that a token meets, embedding and head excluded: of the routed experts those that it takes.

    Args:
      config: of the model.
      shapes: the model, or its shapes.
    """
    total = 0
    for name, leaf in named_leaves(shapes).items():
        if name.startswith(("embedding.", "head.")):
            continue
        count = math.prod(leaf.shape)
        if name.startswith(EXPERTS):
            count = count * config.moe.experts_per_token // config.moe.num_experts
        total += count
    return total


EXPERTS = ("sublayers.moe.gate.", "sublayers.moe.up.", "sublayers.moe.down.")
"""What the stacks of routed experts are called; their axes are layers, experts, inputs, outputs."""
