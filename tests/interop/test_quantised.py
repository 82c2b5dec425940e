"""FP8 by tiles, as DeepSeek-V3 is released, against plain loops; and what MXFP4's scale of 255 says."""

import ml_dtypes
import numpy as np
import pytest
from checkpoints import copy, edit_config, rewrite, tensors, tokens
from safetensors.numpy import save_file

from attnres_jax.interop import InteropError, convert, load_pretrained
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


def test_a_release_in_8_bits_loads_and_converts(tmp_path):
    """Matrices of the layers in 8 bits, the rest as it is: DeepSeek-V3's quantization_config."""
    directory, plain = copy("deepseek_v3", tmp_path / "in"), copy("deepseek_v3", tmp_path / "plain")

    def quantise(held):
        for name in [name for name in held if name.endswith("proj.weight") or "kv_a_proj" in name]:
            held[name], held[f"{name}_scale_inv"] = in_tiles(held[name])

    def dequantise(held):
        for name in [name for name in held if f"{name}_scale_inv" in held]:
            held[name] = held[name].astype(np.float32) * held.pop(f"{name}_scale_inv")[0, 0]

    rewrite(directory, quantise)
    rewrite(plain, lambda held: (quantise(held), dequantise(held)))
    stored = [entry.dtype for entry in TensorStore(directory).stored.values()]
    assert stored.count("F8_E4M3") > 20
    edit_config(directory, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
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
