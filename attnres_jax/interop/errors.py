"""What goes wrong with other people's files, in one line each; and libraries that the core install lacks."""

import importlib
from types import ModuleType

from attnres_jax.errors import UserError


class InteropError(UserError, ValueError):
    """A checkpoint directory that cannot be read, written or converted; the message names the file and the way out."""


def need(module: str) -> ModuleType:
    """Imports a library of the extra `hf`.

    Raises:
      InteropError: naming the extra, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise InteropError(f"{name} is not installed; install it with: pip install 'attnres_jax[hf]'") from None
