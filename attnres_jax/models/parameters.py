"""Parameters by name."""

from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by dotted name, as in `sublayers.gqa.query.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {parameter_name(path): leaf for path, leaf in leaves}


def parameter_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a dotted name; the `.value` of an nnx variable is left out."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
