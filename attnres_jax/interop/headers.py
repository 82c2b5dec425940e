"""The header of a safetensors file, trusted only after every number in it has been checked.

Layout: 8 bytes of header length (little-endian), the header as JSON, the tensors' bytes without gaps.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from attnres_jax.interop.errors import InteropError

DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of an element."""

MAX_HEADER = 100_000_000
"""What the safetensors library takes at most."""


class Entry(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte behind the header."""
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name.

    Raises:
      InteropError: one line, for a file that is truncated, or whose header is not exactly what its bytes need.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise _bad(path, f"it has {size} bytes, fewer than the 8 of the header's length")
            if length > MAX_HEADER:
                raise _bad(path, f"its header length {length} is above {MAX_HEADER}")
            if length > size - 8:
                raise _bad(path, f"its header length {length} is more than the file's {size} bytes hold")
            text = file.read(length)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateError as error:
        raise _bad(path, f"its header has {str(error)!r} twice") from None
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ is not an object of strings")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES if isinstance(dtype, str) else True:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape):
        raise _bad(path, f"tensor {name!r} has the shape {shape!r}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has the offsets {offsets!r}")
    needed = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise _bad(path, f"tensor {name!r} needs {needed} bytes and its offsets span {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), *offsets)


def _check_layout(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    end, previous = 0, None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _bad(path, f"tensors {previous!r} and {name!r} overlap")
        if entry.begin > end:
            raise _bad(path, f"{entry.begin - end} bytes before tensor {name!r} belong to none")
        if entry.end > size:
            raise _bad(path, f"tensor {name!r} ends at byte {entry.end} of {size}: the file is truncated")
        end, previous = entry.end, name
    if end != size:
        raise _bad(path, f"{size - end} bytes at its end belong to no tensor")


class _DuplicateError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateError(key)
        found[key] = value
    return found


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _bad(path: Path, what: str) -> InteropError:
    return InteropError(f"{path} is not a sound safetensors file: {what}")
