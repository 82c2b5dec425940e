"""Files that are damaged or made to harm: one line each, and nothing read beyond the header."""

import json
import struct

import numpy as np
import pytest
from checkpoints import copy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from attnres_jax.interop import InteropError, load_pretrained
from attnres_jax.interop.headers import Entry, read_header
from attnres_jax.interop.store import TensorStore

SOUND = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.int64)})


def with_header(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(InteropError) as error:
        read_header(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_a_sound_file(tmp_path):
    (tmp_path / "x").write_bytes(SOUND)
    assert read_header(tmp_path / "x") == {"b": Entry("I64", (2,), 0, 16), "a": Entry("F32", (2, 3), 16, 40)}
    (tmp_path / "x").write_bytes(with_header({}, b""))
    assert read_header(tmp_path / "x") == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 bytes"),
        (SOUND[:7], "has 7 bytes"),
        (SOUND[:40], "more than the file's"),
        (SOUND[:-1], "is truncated"),
        (SOUND + b"\0", "1 bytes at its end belong to no tensor"),
        (struct.pack("<Q", 1 << 63) + SOUND[8:], "above 100000000"),
        (with_header(b"{"), "is not JSON"),
        (with_header(b"[" * 100_000), "is not JSON"),
        (with_header(b"\xff\xfe"), "is not JSON"),
        (with_header([]), "is not a JSON object"),
        (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
        (with_header(b'{"a": 1, "a": 1}'), "'a' twice"),
        (with_header({"a": 1}), "not exactly dtype, shape and data_offsets"),
        (with_header({"a": tensor(0, 8, "F99")}), "unknown dtype 'F99'"),
        (with_header({"a": tensor(0, 8, ["F32"])}), "unknown dtype"),
        (with_header({"a": tensor(0, 8, shape=(-2,))}), "has the shape [-2]"),
        (with_header({"a": tensor(0, 8, shape=(2.0,))}), "has the shape [2.0]"),
        (with_header({"a": tensor(0, 8, shape=(True, 2))}), "has the shape"),
        (with_header({"a": tensor(8, 0, shape=(2,))}), "has the offsets [8, 0]"),
        (with_header({"a": tensor(0, 8, shape=(3,))}), "needs 12 bytes and its offsets span 8"),
        (with_header({"a": tensor(0, 8, shape=(1 << 40, 1 << 40))}), "needs"),
        (with_header({"a": tensor(0, 8, shape=(2,)), "b": tensor(4, 8)}), "'a' and 'b' overlap"),
        (with_header({"a": tensor(0, 8, shape=(2,)), "b": tensor(0, 8, shape=(2,))}), "overlap"),
        (with_header({"a": tensor(4, 8)}), "4 bytes before tensor 'a' belong to none"),
        (with_header({"a": tensor(0, 12, shape=(3,))}), "is truncated"),
    ],
)
def test_damaged_and_hostile_headers(content, message, tmp_path):
    assert message in refusal(tmp_path / "x.safetensors", content)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_is_read_or_refused(tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(SOUND[:place] + bytes([value]) + SOUND[place + 1 :])
    try:
        entries = read_header(path)
    except InteropError as error:
        assert "\n" not in str(error)
    else:
        assert all(entry.end <= len(SOUND) for entry in entries.values())


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin", "", 3]
)
def test_an_index_may_not_lead_out_of_its_directory(file, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InteropError, match=r"no \.safetensors file of its directory"):
        TensorStore(tmp_path)


def test_index_and_files_have_to_agree(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(InteropError, match=r"has neither model\.safetensors nor"):
        TensorStore(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InteropError, match="is a pickle, which is not read"):
        TensorStore(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(InteropError, match=r"lacks x\.safetensors, which its index names"):
        TensorStore(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    assert set(TensorStore(tmp_path).entries) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(InteropError, match="disagree on tensor 'b'"):
        TensorStore(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys("abc", "x.safetensors")}))
    with pytest.raises(InteropError, match="disagree on tensor 'c'"):
        TensorStore(tmp_path)
    index.write_text("[]")
    with pytest.raises(InteropError, match="is not a JSON object"):
        TensorStore(tmp_path)


def test_a_truncated_model_is_refused_before_anything_is_built(tmp_path):
    directory = copy("llama", tmp_path / "llama")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InteropError, match="truncated"):
        load_pretrained(directory)
