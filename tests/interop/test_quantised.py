"""FP8 by tiles, as DeepSeek-V3 is released, against plain loops; numbers quantised again; MXFP4's scale of 255."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import copy, edit_config, rewrite, same_bytes, stored, tensors, tokens
from safetensors.numpy import save_file

from attnres_jax.interop import InteropError, convert, load_pretrained, save_pretrained
from attnres_jax.interop.store import TensorStore
from attnres_jax.models import named_leaves

NAME = "model.layers.0.mlp.up_proj.weight"


def in_tiles(weight):
    """(numbers of 8 bits, scales of 128 x 128 tiles), tile by tile, the largest number of each at E4M3's largest."""
    tiles = [-(-size // 128) for size in weight.shape]
    codes, scales = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros(tiles, np.float32)
    for place in np.ndindex(*tiles):
        at = tuple(slice(128 * i, 128 * (i + 1)) for i in place)
        scales[place] = np.abs(weight[at]).max() / 448
        codes[at] = (weight[at] / scales[place]).astype(codes.dtype)
    return codes, scales


@pytest.fixture
def one(tmp_path):
    """(a directory with one tensor of 3 x 2 tiles, what it stands for)."""
    codes, scales = in_tiles(np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32))
    save_file(
        {NAME: codes, f"{NAME}_scale_inv": scales, "other": np.ones(3, np.float32)}, tmp_path / "model.safetensors"
    )
    stands_for = [[float(codes[i, j]) * float(scales[i // 128, j // 128]) for j in range(200)] for i in range(300)]
    return tmp_path, np.array(stands_for)


@pytest.mark.parametrize(
    "part", [None, (slice(5, 140), slice(127, 129)), (slice(299, 300), slice(0, 200)), (slice(128, 256),)]
)
def test_parts_are_numbers_times_the_scales_of_their_tiles(one, part):
    directory, expected = one
    np.testing.assert_allclose(TensorStore(directory).read(NAME, part), expected[part or ...], rtol=1e-7)


def quantise(held):
    """Matrices of the layers in 8 bits, the rest as it is: DeepSeek-V3's quantization_config."""
    for name in [name for name in held if name.endswith("proj.weight") or "kv_a_proj" in name]:
        held[name], held[f"{name}_scale_inv"] = in_tiles(held[name])


@pytest.fixture
def in_8_bits(tmp_path):
    """A directory of DeepSeek-V3's format."""
    directory = copy("deepseek_v3", tmp_path / "in")
    rewrite(directory, quantise)
    edit_config(directory, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
    return directory


def test_a_release_in_8_bits_loads_and_converts(in_8_bits, tmp_path):
    directory, plain = in_8_bits, copy("deepseek_v3", tmp_path / "plain")

    def dequantise(held):
        for name in [name for name in held if f"{name}_scale_inv" in held]:
            held[name] = held[name].astype(np.float32) * held.pop(f"{name}_scale_inv")[0, 0]

    rewrite(plain, lambda held: (quantise(held), dequantise(held)))
    assert [dtype for dtype, *_ in stored(directory).values()].count("F8_E4M3") > 20
    model, expected = (load_pretrained(where, param_dtype="float32") for where in (directory, plain))
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, named_leaves(expected)[name], err_msg=name)
    convert(directory, tmp_path / "block", residual="block")
    inputs = tokens(vocab=96)
    np.testing.assert_allclose(
        load_pretrained(tmp_path / "block", param_dtype="float32")(inputs), expected(inputs), rtol=1e-4, atol=1e-5
    )
    assert named_leaves(load_pretrained(directory))["sublayers.swiglu.up.kernel"].dtype == ml_dtypes.bfloat16
    assert tensors(plain)[NAME].dtype == np.float32


def test_scales_that_do_not_fit_are_refused(one):
    directory, _ = one
    codes, scales = in_tiles(np.ones((300, 200), np.float32))
    save_file({NAME: codes, f"{NAME}_scale_inv": scales[:-1]}, directory / "model.safetensors")
    with pytest.raises(InteropError, match=r"is not FP8 .* it has \[300, 200\] and F32 scales \[2, 2\]"):
        TensorStore(directory)
    save_file({NAME: codes}, directory / "model.safetensors")
    with pytest.raises(InteropError, match="has the dtype F8_E4M3, which is not supported"):
        TensorStore(directory).read(NAME)


def test_a_scale_of_255_is_not_a_number(tmp_path):
    """And 127 is one (OCP Microscaling Formats, 5.4.1)."""
    held = {
        f"{NAME}_packed": np.full((2, 32), 0x21, np.uint8),
        f"{NAME}_scale": np.array([[127, 255], [0, 254]], np.uint8),
    }
    save_file(held, tmp_path / "model.safetensors")
    rows = TensorStore(tmp_path).read(NAME)
    assert rows[0, 0] == 0.5 and np.isnan(rows[0, 32:]).all()
    assert rows[1, 0] == 2.0**-128 and rows[1, 33] == 2.0**127


def test_saved_in_8_bits_again_what_has_not_changed_keeps_its_bytes(in_8_bits, tmp_path):
    save_pretrained(load_pretrained(in_8_bits), tmp_path / "out", like=in_8_bits, quantised=True, max_shard_bytes=9000)
    assert stored(tmp_path / "out") == stored(in_8_bits)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((in_8_bits / "config.json").read_text())


def test_a_dtype_is_of_the_tensors_that_are_not_quantised(in_8_bits, tmp_path):
    model, before = load_pretrained(in_8_bits), stored(in_8_bits)
    save_pretrained(model, tmp_path / "again", like=in_8_bits, quantised=True, dtype="bfloat16")
    for name, (dtype, _, data) in stored(tmp_path / "again").items():
        if before[name][0] == "F8_E4M3" or name.endswith(("_scale_inv", "correction_bias")):
            assert (dtype, data) == (before[name][0], before[name][2])
        else:
            assert dtype == "BF16"
    save_pretrained(model, tmp_path / "plain", like=in_8_bits, dtype="float32")
    assert {dtype for dtype, *_ in stored(tmp_path / "plain").values()} == {"F32"}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_changed_tiles_are_the_nearest_numbers_of_8_bits(one, dtype):
    directory, _ = one
    store = TensorStore(directory)
    before = store.read(NAME).astype(dtype)
    changed = before.copy()
    changed[:128, 128:] = np.random.default_rng(1).normal(size=(128, 72))
    changed[128:256, :128] = 0
    new = store.quantise(NAME, changed)
    codes, scales = new[NAME], new[f"{NAME}_scale_inv"]
    old, old_scales = (stored(directory)[name][2] for name in (NAME, f"{NAME}_scale_inv"))
    old = np.frombuffer(old, codes.dtype).reshape(codes.shape)
    old_scales = np.frombuffer(old_scales, np.float32).reshape(scales.shape)
    same = np.ones((3, 2), bool)
    same[0, 1] = same[1, 0] = False
    for i, j in np.argwhere(same):
        at = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        assert codes[at].tobytes() == old[at].tobytes() and scales[i, j] == old_scales[i, j]
    expected, its_scales = in_tiles(changed.astype(np.float32)[:128, 128:])
    np.testing.assert_array_equal(codes[:128, 128:], expected)
    np.testing.assert_array_equal(scales[0, 1], its_scales[0, 0])
    assert not codes[128:256, :128].astype(np.float32).any()
    changed[0, 0] = np.nan
    with pytest.raises(InteropError, match=r"up_proj\.weight' has numbers that are not finite"):
        store.quantise(NAME, changed)


def test_changed_groups_are_the_nearest_numbers_of_4_bits(tmp_path):
    """Every one of them is as near as any number under the group's scale is; ties go to the even code."""
    draw = np.random.default_rng(2)
    held = {f"{NAME}_packed": draw.integers(0, 256, (3, 48), np.uint8)}
    held[f"{NAME}_scale"] = draw.integers(120, 130, (3, 3)).astype(np.uint8)
    save_file(held, tmp_path / "model.safetensors")
    store = TensorStore(tmp_path)
    changed = store.read(NAME)
    assert same_bytes(store.quantise(NAME, changed), held)
    changed[0, :32], changed[2, 64:] = draw.normal(size=(2, 32))
    changed[1, 32:64] = [6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -5, *[0] * 22]
    new = store.quantise(NAME, changed)
    untouched = np.ones((3, 3), bool)
    untouched[[0, 1, 2], [0, 1, 2]] = False
    assert (new[f"{NAME}_scale"] == held[f"{NAME}_scale"])[untouched].all()
    assert (new[f"{NAME}_packed"] == held[f"{NAME}_packed"]).reshape(3, 3, 16)[untouched].all()
    save_file(new, tmp_path / "model.safetensors")
    again = TensorStore(tmp_path).read(NAME)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.concatenate([numbers, -numbers])
    for row, columns in ((0, slice(0, 32)), (2, slice(64, 96))):
        scale = 2.0 ** (int(new[f"{NAME}_scale"][row, columns.start // 32]) - 127)
        assert 4 * scale <= abs(changed[row, columns]).max() < 8 * scale
        distances = abs(changed[row, columns, None] - scale * numbers)
        np.testing.assert_allclose(abs(again[row, columns] - changed[row, columns]), distances.min(-1), rtol=1e-6)
    assert new[f"{NAME}_scale"][1, 1] == 127
    assert again[1, 32:42].tolist() == [6, 4, 4, 2, 2, 1, 1, 0, 0, -4]
