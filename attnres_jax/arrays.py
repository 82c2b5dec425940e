"""Arguments that are no such arrays as they should be are refused in one line, by their shapes and dtypes alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS, INTEGERS = jnp.floating, jnp.integer
_NAMES = {FLOATS: "floats", INTEGERS: "integers"}


def expect(kind: Any, shape: tuple[int | str, ...], arrays: dict[str, Any], way_out: str = "") -> None:
    """Refuses arguments by name that are no arrays of a kind and shape.

    Args:
      kind: `FLOATS` or `INTEGERS`, of any width.
      shape: lengths, names for any; with a name that begins with *, only the least number of axes is asked for.
      arrays: the arguments.
      way_out: what to do about it.

    Raises:
      ValueError: naming the argument, what it should be and what it is.
    """
    starred = any(str(length).startswith("*") for length in shape)
    for name, x in arrays.items():
        own, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
        same = [isinstance(length, str) or length == there for length, there in zip(shape, own, strict=False)]
        fits = len(own) >= len(shape) - 1 if starred else len(own) == len(shape) and all(same)
        if fits and isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, kind):
            continue
        given = f"a {type(x).__name__}; jnp.asarray makes an array of it" if dtype is None else f"{dtype}{[*own]}"
        wanted = f"[{', '.join(map(str, shape))}] of {_NAMES[kind]}"
        raise ValueError(f"{name} must be {wanted}, not {given}{way_out}")
