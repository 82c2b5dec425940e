"""Tensors that a checkpoint keeps in 4 or 8 bits with scales beside them: as the numbers they stand for, and back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.headers import Entry

GROUP = 32
"""Numbers of a row that share an MXFP4 scale (OCP Microscaling Formats, 5.3)."""
TILE = 128
"""Rows, and columns, that share an FP8 scale (DeepSeek-V3, `weight_block_size` of its config.json)."""
FP4 = np.array([*(0, 0.5, 1, 1.5, 2, 3, 4, 6), *(-0.0, -0.5, -1, -1.5, -2, -3, -4, -6)], np.float32)
"""The sixteen numbers of E2M1."""
LARGEST_FP8 = 448
"""Of E4M3."""

Read = Callable[[tuple[slice, slice]], np.ndarray]


class Quantised(NamedTuple):
    """A tensor in two parts."""

    values: str
    scales: str
    shape: tuple[int, ...]
    dequantise: Callable[[Read, Read, range, range], np.ndarray]
    """From the reader of either part to some rows and columns of the tensor, float32."""
    quantise: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """From new numbers, old ones in the same dtype and both parts of these to both parts of the new: nearest numbers
    under a scale that fits the largest. What has not changed, group by group, keeps its bytes."""


def quantised(entries: Mapping[str, Entry]) -> dict[str, Quantised]:
    """The quantised tensors of a checkpoint, by the names that they would have.

    Kimi K3's experts are MXFP4: `NAME_packed` and `NAME_scale`. The weights of DeepSeek-V3, and the FP8 releases of
    Qwen3, are E4M3 by tiles: `NAME` and `NAME_scale_inv`, which is what they are multiplied with.

    Raises:
      InteropError: if values and scales do not belong together.
    """
    found = {}
    for values, entry in entries.items():
        name = values.removesuffix("_packed")
        if name.endswith(".weight") and name != values:
            found[name] = _mxfp4(name, entry, entries.get(f"{name}_scale"))
        elif entry.dtype == "F8_E4M3" and f"{values}_scale_inv" in entries:
            found[values] = _fp8(values, entry, entries[f"{values}_scale_inv"])
    return found


def _mxfp4(name: str, values: Entry, scales: Entry | None) -> Quantised:
    shape = (*values.shape[:1], -(-2 * values.shape[-1] // GROUP)) if len(values.shape) == 2 else None
    if scales is None or {values.dtype, scales.dtype} != {"U8"} or scales.shape != shape or values.shape[1] % 16:
        need = f"bytes of [rows, 16 n], and {name}_scale of [rows, n]"
        raise InteropError(f"tensor {name + '_packed'!r} is not MXFP4: {need}")
    return Quantised(
        f"{name}_packed", f"{name}_scale", (values.shape[0], 2 * values.shape[1]), _dequantise_mxfp4, _mxfp4_of
    )


def _dequantise_mxfp4(read_values: Read, read_scales: Read, rows: range, columns: range) -> np.ndarray:
    """Two numbers a byte, the lower half first, and one power of two for 32 of a row, of which 255 is not a number."""
    first, last = columns.start // GROUP, -(-columns.stop // GROUP)
    codes = read_values((_slice(rows), slice(first * GROUP // 2, last * GROUP // 2)))
    powers = read_scales((_slice(rows), slice(first, last))).astype(np.int32)[..., None]
    numbers = FP4[np.stack([codes & 15, codes >> 4], -1)].reshape(len(codes), -1, GROUP)
    scaled = np.ldexp(numbers, np.where(powers == 255, 0, powers - 127))
    numbers = np.where(powers == 255, np.float32(np.nan), scaled).reshape(len(codes), -1)
    return numbers[:, columns.start - first * GROUP : columns.stop - first * GROUP]


def _mxfp4_of(
    numbers: np.ndarray, old: np.ndarray, codes: np.ndarray, powers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales as the format proposes (6.3): the power of two of a group's largest number is that of the code 4."""
    groups = numbers.astype(np.float32).reshape(len(numbers), -1, GROUP)
    _, exponents = np.frexp(np.abs(groups).max(-1))
    new_powers = np.clip(exponents - 3 + 127, 0, 254)
    sizes = np.ldexp(np.abs(groups), 127 - new_powers[..., None])
    middles = (FP4[:7] + FP4[1:8]) / 2
    new_codes = np.searchsorted(middles, sizes)  # the lower one in the middle; to even, as in IEEE 754:
    new_codes += (sizes == middles[np.minimum(new_codes, 6)]) & (new_codes % 2 == 1)
    new_codes = (new_codes + 8 * np.signbit(groups)).astype(np.uint8)
    new_codes = new_codes[..., 0::2] | new_codes[..., 1::2] << 4
    same = (old.view(f"u{old.itemsize}") == numbers.view(f"u{old.itemsize}")).reshape(groups.shape).all(-1)
    new_codes = np.where(same[..., None], codes.reshape(new_codes.shape), new_codes)
    return new_codes.reshape(codes.shape), np.where(same, powers, new_powers.astype(np.uint8))


def _fp8(name: str, values: Entry, scales: Entry) -> Quantised:
    shape = tuple(-(-size // TILE) for size in values.shape)
    if len(shape) != 2 or 0 in shape or scales.shape != shape or scales.dtype not in ("F32", "BF16"):
        have = f"{list(values.shape)} and {scales.dtype} scales {list(scales.shape)}"
        raise InteropError(f"tensor {name!r} is not FP8 with a scale for each {TILE} x {TILE} tile: it has {have}")
    return Quantised(name, f"{name}_scale_inv", values.shape, _dequantise_fp8, _fp8_of)


def _dequantise_fp8(read_values: Read, read_scales: Read, rows: range, columns: range) -> np.ndarray:
    """Each number times the scale of its tile."""
    tiles = [np.array(part) // TILE for part in (rows, columns)]
    scales = read_scales(tuple(slice(own[0], own[-1] + 1) for own in tiles)).astype(np.float32)
    scales = scales[np.ix_(*(own - own[0] for own in tiles))]
    return read_values((_slice(rows), _slice(columns))).astype(np.float32) * scales


def _fp8_of(
    numbers: np.ndarray, old: np.ndarray, codes: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of a tile becomes the format's largest."""
    new_codes, new_scales = codes.copy(), scales.copy()
    for place in np.ndindex(scales.shape):
        at = tuple(slice(TILE * i, TILE * (i + 1)) for i in place)
        if not np.array_equal(old[at], numbers[at]):
            tile = numbers[at].astype(np.float32)
            new_scales[place] = np.abs(tile).max() / LARGEST_FP8 or 1.0
            quotients = tile / new_scales[place].astype(np.float32)
            new_codes[at] = np.clip(quotients, -LARGEST_FP8, LARGEST_FP8).astype(codes.dtype)
    return new_codes, new_scales


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
