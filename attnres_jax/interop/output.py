"""A new directory that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from attnres_jax.interop.errors import InteropError


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into, which becomes `target` when the block ends without an exception.

    Raises:
      InteropError: if `target` is a file or not empty, or cannot be written.
    """
    target = Path(os.path.realpath(target))  # of a link, what it points to
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InteropError(f"{target} exists and is not an empty directory; name a new one")
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise InteropError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
