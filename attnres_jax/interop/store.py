"""The tensors of a checkpoint directory: found through its index, read slice by slice, written shard by shard."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from attnres_jax.interop.errors import InteropError, need
from attnres_jax.interop.headers import Entry, read_header
from attnres_jax.interop.quantised import quantised

NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""dtypes of a model's numbers. Integers are quantised ones, which are known to `quantised` or not read."""

STORED = {dtype: name for name, dtype in NUMPY.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorStore:
    """The tensors of a directory by name; nothing is read but headers until a slice is asked for."""

    def __init__(self, directory: Path):
        """Reads the index and all headers.

        Raises:
          InteropError: if there are no weights, or index, headers and files do not agree.
        """
        self.directory = directory
        self.stored: dict[str, Entry] = {}
        """As the files have them."""
        self.files: dict[str, str] = {}
        for file, expected in _files(directory).items():
            entries = read_header(directory / file)
            if expected is not None and set(entries) != expected:
                name = min(set(entries) ^ expected)
                where = "lists it elsewhere or not at all" if name in entries else "says it is there, and it is not"
                raise InteropError(f"{directory / INDEX} and {file} disagree on tensor {name!r}: the index {where}")
            self.stored |= entries
            self.files |= dict.fromkeys(entries, file)
        self._open: dict[str, Any] = {}
        self.quantised = quantised(self.stored)
        self.entries = dict(self.stored)
        """As they can be read: a quantised one with its scales is one tensor."""
        for name, parts in self.quantised.items():
            del self.entries[parts.values], self.entries[parts.scales]
            self.entries[name] = Entry("BF16", parts.shape, 0, 0)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          InteropError: if it cannot be read here.
        """
        stored = self.entries[name].dtype
        if stored not in NUMPY:
            raise InteropError(f"tensor {name!r} of {self.directory} has the dtype {stored}, which is not supported")
        return NUMPY[stored]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the part of it at `index`: only its bytes are read. A quantised one comes as float32."""
        self.dtype(name)
        if name not in self.quantised:
            return self._read(name, index)
        values, scales, shape, dequantise, _ = self.quantised[name]
        parts = [range(size)[at] for size, at in itertools.zip_longest(shape, index or (), fillvalue=slice(None))]
        return dequantise(partial(self._read, values), partial(self._read, scales), *parts)

    def quantise(self, name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Other numbers in the format of a quantised tensor: its two parts by name.

        Raises:
          InteropError: if a number is not finite, of which no scale is the largest.
        """
        parts = self.quantised[name]
        if not np.isfinite(numbers.astype(np.float32)).all():
            raise InteropError(f"tensor {name!r} has numbers that are not finite, and cannot be quantised")
        held = [self._read(half, None) for half in (parts.values, parts.scales)]
        old = parts.dequantise(*(half.__getitem__ for half in held), *map(range, parts.shape)).astype(numbers.dtype)
        new = parts.quantise(numbers, old, *held)
        return dict(zip((parts.values, parts.scales), new, strict=True))

    def _read(self, name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        safetensors, file, entry = need("safetensors"), self.files[name], self.stored[name]
        try:
            if entry.dtype == "F8_E4M3":  # which the library does not give to NumPy
                with (self.directory / file).open("rb") as opened:
                    begin = 8 + int.from_bytes(opened.read(8), "little") + entry.begin
                mapped = np.memmap(self.directory / file, ml_dtypes.float8_e4m3fn, "r", begin, entry.shape)
                return np.array(mapped[index or ...])
            if file not in self._open:
                self._open[file] = safetensors.safe_open(str(self.directory / file), framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            raise InteropError(f"{self.directory / file} cannot be read: {error}") from None
        handle = self._open[file]
        if not index or 0 in entry.shape:
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]


def _files(directory: Path) -> dict[str, set[str] | None]:
    """The files with weights, and the tensors that the index says each holds; None where there is no index."""
    if (directory / SINGLE).exists():
        return {SINGLE: None}
    if not (directory / INDEX).exists():
        pickles = sorted(path.name for path in directory.glob("*.bin")) if directory.is_dir() else []
        more = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise InteropError(f"{directory} has neither {SINGLE} nor {INDEX}{more}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InteropError(f"{directory / INDEX} has no weight_map")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise InteropError(f"{directory / INDEX} names {file!r}, which is no .safetensors file of its directory")
        files.setdefault(file, set()).add(name)
    for file in files:
        if not (directory / file).is_file():
            raise InteropError(f"{directory} lacks {file}, which its index names")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InteropError: if it is not there or not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InteropError(f"{path} is not a JSON object")
    return values


def write_tensors(
    directory: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, holding one shard in memory at a time.

    Args:
      directory: exists, and has no weights.
      sizes: bytes of each tensor, in the order in which they are written.
      make: gives a tensor by name.
      max_shard_bytes: a shard has at most these, or one tensor.
      progress: wraps the iteration over names.
    """
    shards = _shards(sizes, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else shard_names(len(shards))
    file_of = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    held: dict[str, np.ndarray] = {}
    for tensor in progress(list(file_of)):
        held[tensor] = np.ascontiguousarray(make(tensor))
        if tensor == shards[names.index(file_of[tensor])][-1]:
            write_file(directory / file_of[tensor], held)
            held = {}
    if len(shards) > 1:
        write_index(directory, file_of, sum(sizes.values()))


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file; the arrays are contiguous.

    Raises:
      InteropError: if it cannot be written.
    """
    safetensors, save_file = need("safetensors"), need("safetensors.numpy").save_file
    path.touch()
    mode = path.stat().st_mode  # the library makes files that nobody else can read
    try:
        save_file(dict(tensors), str(path), metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # a full disk, say
        raise InteropError(f"{path} cannot be written: {error}") from None
    path.chmod(mode)


def write_index(directory: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """The index of a sharded checkpoint."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shard_names(count: int) -> list[str]:
    """The usual names of `count` shards."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Sequence[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
