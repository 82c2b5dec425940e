"""The tensors of a checkpoint directory: found through its index, read slice by slice, written shard by shard."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from attnres_jax.interop.errors import InteropError, need
from attnres_jax.interop.headers import Entry, read_header

NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""dtypes that can be read here."""

STORED = {dtype: name for name, dtype in NUMPY.items()}
GROUP = 32
"""Numbers of a row that share an MXFP4 scale (OCP Microscaling Formats, 5.3)."""
FP4 = np.array([*(0, 0.5, 1, 1.5, 2, 3, 4, 6), *(-0.0, -0.5, -1, -1.5, -2, -3, -4, -6)], np.float32)
"""The sixteen numbers of E2M1."""
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
        self._packed = _packed(self.stored)
        self.entries = dict(self.stored)
        """As they can be read: a quantised one with its scales is one tensor."""
        for name, (values, scales) in self._packed.items():
            rows, half = self.entries.pop(values).shape
            self.entries[name] = Entry("BF16", (rows, 2 * half), 0, 0)
            self.entries.pop(scales)

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
        """A tensor, or the part of it at `index`: only its bytes are read."""
        self.dtype(name)
        if name in self._packed:
            return self._dequantised(*self._packed[name], index or (slice(None), slice(None)))
        return self._read(name, index)

    def _dequantised(self, values: str, scales: str, index: tuple[slice, ...]) -> np.ndarray:
        """MXFP4: two numbers a byte, the lower half first, and one power of two for 32 of a row."""
        rows = index[0]
        start, stop, _ = index[1].indices(2 * self.stored[values].shape[1])
        first, last = start // GROUP, -(-stop // GROUP)
        codes = self._read(values, (rows, slice(first * GROUP // 2, last * GROUP // 2)))
        powers = self._read(scales, (rows, slice(first, last)))
        numbers = FP4[np.stack([codes & 15, codes >> 4], -1)].reshape(len(codes), -1, GROUP)
        scaled = np.ldexp(numbers, powers[..., None].astype(np.int32) - 127).reshape(len(codes), -1)
        return scaled[:, start - first * GROUP : stop - first * GROUP].astype(NUMPY["BF16"])

    def _read(self, name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        safetensors, file = need("safetensors"), self.files[name]
        if file not in self._open:
            try:
                self._open[file] = safetensors.safe_open(str(self.directory / file), framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise InteropError(f"{self.directory / file} cannot be read: {error}") from None
        handle = self._open[file]
        if not index or 0 in self.stored[name].shape:
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]


def _packed(entries: Mapping[str, Entry]) -> dict[str, tuple[str, str]]:
    """The tensors kept as MXFP4, by the name they would have: those of their numbers and of their scales.

    Raises:
      InteropError: if the two do not belong together.
    """
    packed = {}
    for values, entry in entries.items():
        name = values.removesuffix("_packed")
        if name == values or not name.endswith(".weight"):
            continue
        scales = entries.get(f"{name}_scale")
        shape = (*entry.shape[:1], -(-2 * entry.shape[-1] // GROUP)) if len(entry.shape) == 2 else None
        if scales is None or {entry.dtype, scales.dtype} != {"U8"} or scales.shape != shape or entry.shape[1] % 16:
            raise InteropError(f"tensor {values!r} is not MXFP4: bytes of [rows, 16 n], and {name}_scale of [rows, n]")
        packed[name] = (values, f"{name}_scale")
    return packed


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
    """One safetensors file; the arrays are contiguous."""
    save_file = need("safetensors.numpy").save_file
    path.touch()
    mode = path.stat().st_mode  # the library makes files that nobody else can read
    save_file(dict(tensors), str(path), metadata={"format": "pt"})
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
