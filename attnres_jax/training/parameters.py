"""Parameters by name: groups, decay, share of the learning rate, norms, and the table printed at the start."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.config import OptimizerConfig
from attnres_jax.models import named_leaves

MATRICES = ("kernel", "table")
"""Leaf names of matrices. Layers are stacked, so a norm scale is two-dimensional as well and ndim decides nothing."""

MODULES = {
    "embedding": "embedding",
    "head": "head",
    "gqa": "attention",
    "mla": "attention",
    "kda": "attention",
    "swiglu": "mlp",
    "moe.shared": "mlp",
    "moe.latent_down": "mlp",
    "moe.latent_up": "mlp",
    "moe.router": "router",
    "moe.correction_bias": "router",
    "moe": "experts",
}
"""Which group the parameters inside a module belong to, where their own name does not say it; the first match
counts."""


DEPTH_GROUPS = {
    "query": "depth_queries",
    "query_projection": "depth_queries",
    "source_logit": "depth_queries",
    "key_scale": "depth_key_scales",
}
"""The same for a depth rule's parameters, by their own names: what says where a site looks is its query."""


DEPTH_SETTINGS = {"depth_queries": "depth_query", "depth_key_scales": "depth_key_scale"}
"""How the optimizer's settings of these groups begin."""


def parameter_group(name: str) -> str:
    """embedding, head, attention, mlp, experts, router, norms, depth_queries, depth_key_scales or depth_other.

    Raises:
      ValueError: for a name that belongs to none; `MODULES` is the place to say where it does.
    """
    first, *_, leaf = name.split(".")
    if first == "sites":
        return DEPTH_GROUPS.get(leaf, "depth_other")
    if leaf == "scale":
        return "norms"
    for module, group in MODULES.items():
        if f".{module}." in f".{name}.":
            return group
    raise ValueError(f"parameter {name!r} belongs to no group; known modules: {', '.join(MODULES)}")


def weight_decay(name: str, config: OptimizerConfig) -> float:
    """The decay of a parameter: of matrices, and at rates of their own of a depth rule's parameters."""
    if name.startswith("sites."):
        return config.depth_weight_decay * _of_group(name, "decay_multiplier", config)
    return config.weight_decay if name.rpartition(".")[2] in MATRICES else 0.0


def learning_rate_multiplier(name: str, config: OptimizerConfig) -> float:
    """What the learning rate of a parameter is multiplied with."""
    return _of_group(name, "lr_multiplier", config)


def _of_group(name: str, setting: str, config: OptimizerConfig) -> float:
    """A multiplier of the group of a depth rule's parameter; 1 if it has none, and for all other parameters."""
    prefix = DEPTH_SETTINGS.get(parameter_group(name)) if name.startswith("sites.") else None
    return getattr(config, f"{prefix}_{setting}") if prefix else 1.0


def group_norms(prefix: str, tree: Any) -> dict[str, Float[Array, ""]]:
    """The Euclidean norm of each group of parameters, float32, as `{"prefix/attention": ...}`."""
    squares: dict[str, Any] = {}
    for name, leaf in named_leaves(tree).items():
        key = f"{prefix}/{parameter_group(name)}"
        squares[key] = squares.get(key, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {key: jnp.sqrt(square) for key, square in squares.items()}


def count_parameters(model: Any) -> int:
    """The number of scalars in the model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


def parameter_table(model: Any, config: OptimizerConfig) -> str:
    """A text table: name, group, shape, count, weight decay, multiplier of the learning rate; then the total.

    Below it are settings of groups of which the model has no parameter. They are no mistake where several depth rules
    are run under the same ones, but do nothing for this one.
    """
    rows = [("parameter", "group", "shape", "count", "decay", "lr")]
    for name, leaf in named_leaves(model).items():
        shape = " x ".join(map(str, leaf.shape))
        own = f"{weight_decay(name, config):g}", f"x{learning_rate_multiplier(name, config):g}"
        rows.append((name, parameter_group(name), shape, f"{math.prod(leaf.shape):,}", *own))
    rows.append(("total", "", "", f"{count_parameters(model):,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i == 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    groups = {group for _, group, *_ in rows[1:-1]}
    for group, prefix in DEPTH_SETTINGS.items():
        for key in (f"{prefix}_decay_multiplier", f"{prefix}_lr_multiplier"):
            if getattr(config, key) != 1 and group not in groups:
                lines.append(f"optimizer.{key}={getattr(config, key):g} changes nothing: the model has no {group}")
    return "\n".join(lines)
