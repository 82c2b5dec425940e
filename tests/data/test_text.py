import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnres_jax.config import DataConfig
from attnres_jax.data import DataError, load_text, open_corpus

FILES = ["tokenizer.json", "train_tokens.npy", "train_offsets.npy", "heldout_tokens.npy", "heldout_offsets.npy"]


def decoded(text, documents):
    return [text.tokenizer.decode(document.tolist()) for document in documents]


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def entry(config):
    (folder,) = Path(config.cache_dir).iterdir()
    return folder


def test_tokens_hold_the_corpus(small):
    text, config = small
    documents = list(open_corpus(config))
    assert decoded(text, text.train) == [document.text for document in documents if not document.heldout]
    assert decoded(text, text.heldout) == [document.text for document in documents if document.heldout]
    assert text.train[0].dtype == np.int32 and text.train.tokens.dtype == np.uint16
    assert isinstance(text.train.tokens, np.memmap)
    assert text.token_bytes.shape == (300,)
    assert text.token_bytes[text.train.tokens].sum() == sum(len(d.text.encode()) for d in documents if not d.heldout)


def test_large_vocabulary_is_padded_and_stored_wider(make_corpus):
    text = load_text(make_corpus(), 70_000)
    assert text.train.tokens.dtype == np.uint32
    assert text.token_bytes.shape == (70_000,) and text.tokenizer.get_vocab_size() < 70_000


def test_tokenizer_sees_the_train_split_alone(tmp_path):
    config = DataConfig(source="text", files=f"{tmp_path}/*.txt", heldout_percent=50, cache_dir=str(tmp_path / "cache"))
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text("text")
    for document in open_corpus(config):
        (tmp_path / document.name).write_text("held" * 50 if document.heldout else "train" * 50)
    vocabulary = load_text(config, 300).tokenizer.get_vocab()
    assert "train" in vocabulary and "held" not in vocabulary


class Bytes:
    """A given tokenizer: an id a byte, from 1 on; 0 around a text."""

    def __init__(self, digest="bytes", size=257):
        self.digest, self.size = digest, size

    def documents(self, texts):
        return (np.array([0, *(byte + 1 for byte in text.encode()), 0], np.int32) for text in texts)

    def token_bytes(self, vocab_size):
        return np.isin(np.arange(vocab_size), range(1, 257)).astype(np.int32)


def test_a_given_tokenizer_reads_the_text(make_corpus):
    config = make_corpus(tokenizer="some/model")
    text = load_text(config, 300, Bytes())
    read = [bytes((document[1:-1] - 1).tolist()).decode() for document in (*text.train, *text.heldout)]
    assert sorted(read) == sorted(document.text for document in open_corpus(config))
    assert text.token_bytes.sum() == 256 and {path.name for path in entry(config).iterdir()} == {
        *("checksums.json", "train_tokens.npy", "train_offsets.npy", "heldout_tokens.npy", "heldout_offsets.npy")
    }
    assert load_text(config, 300, Bytes()).fingerprint == text.fingerprint
    own = load_text(dataclasses.replace(config, tokenizer=""), 300).fingerprint
    assert len({text.fingerprint, load_text(config, 300, Bytes("others")).fingerprint, own}) == 3
    with pytest.raises(DataError, match=r"model.vocab_size=300 has no room .*; nearest: model.vocab_size=301"):
        load_text(config, 300, Bytes(size=301))
    with pytest.raises(DataError, match="is to be given, loaded"):
        load_text(config, 300)


def test_second_call_reads_the_cache(small):
    text, config = small
    before = stamps(entry(config))
    again = load_text(config, 300)
    assert stamps(entry(config)) == before
    assert again.fingerprint == text.fingerprint
    np.testing.assert_array_equal(again.train.tokens, text.train.tokens)
    assert decoded(again, again.heldout) == decoded(text, text.heldout)
    assert again.tokenizer.encode("<|endoftext|>").ids != [0]


def test_fingerprint_follows_contents_split_and_vocabulary(make_corpus):
    config = make_corpus()
    first = load_text(config, 300).fingerprint
    assert load_text(make_corpus(folder="moved"), 300).fingerprint == first
    others = {load_text(config, 301).fingerprint, load_text(make_corpus(heldout_percent=40), 300).fingerprint}
    next(path for path in Path(config.files[: -len("**/*.txt")]).rglob("*.txt")).write_text("changed")
    others.add(load_text(config, 300).fingerprint)
    assert len(others | {first}) == 4


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent"])
def test_damaged_cache_is_made_again(small, name, damage):
    text, config = small
    path = entry(config) / name
    content = bytearray(path.read_bytes())
    path.unlink()  # The damage goes to a new file: `text` has the old one mapped.
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    again = load_text(config, 300)
    assert sorted(stamps(entry(config))) == sorted([*FILES, "checksums.json"])
    np.testing.assert_array_equal(again.heldout.tokens, text.heldout.tokens)
    assert decoded(again, again.train) == decoded(text, text.train)
    before = stamps(entry(config))
    load_text(config, 300)
    assert stamps(entry(config)) == before


SCRIPT = """
import sys
from attnres_jax.config import DataConfig
from attnres_jax.data import load_text
text = load_text(DataConfig(source="text", files=sys.argv[1], heldout_percent=20, cache_dir=sys.argv[2]), 300)
print(text.fingerprint, len(text.train.tokens), int(text.train.tokens.astype(int).sum()))
"""


def start(config):
    command = [sys.executable, "-c", SCRIPT, config.files, config.cache_dir]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_make_one_cache_together_over_a_damaged_one(small):
    text, config = small
    (entry(config) / "tokenizer.json").write_text("{}")
    processes = [start(config) for _ in range(3)]
    results = {process.communicate(timeout=120) for process in processes}
    assert {process.returncode for process in processes} == {0}, results
    total = int(text.train.tokens.astype(int).sum())
    assert {out for out, _ in results} == {f"{text.fingerprint} {len(text.train.tokens)} {total}\n"}
    assert entry(config).name == text.fingerprint


def test_killed_while_making_leaves_nothing_that_harms(make_corpus):
    config = make_corpus(count=3000)
    cache = Path(config.cache_dir)
    process = start(config)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".making_*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    left = list(cache.iterdir())
    assert [path.name[:8] for path in left] == [".making_"]
    os.utime(left[0], (0, 0))
    text = load_text(config, 300)
    assert decoded(text, text.heldout) == [document.text for document in open_corpus(config) if document.heldout]
    assert entry(config).name == text.fingerprint  # What a process killed long ago left is gone.


def test_cache_folder_from_the_environment(make_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "elsewhere"))
    text = load_text(make_corpus(cache_dir=""), 300)
    assert (tmp_path / "elsewhere" / text.fingerprint).is_dir()


def test_cache_folder_that_cannot_be_written(make_corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"data.cache_dir='.*file/cache' cannot be written: Not a directory; name another$"
    ):
        load_text(make_corpus(cache_dir=str(tmp_path / "file" / "cache")), 300)


def test_standard_library(tmp_path):
    config = DataConfig(cache_dir=str(tmp_path))
    text = load_text(config, 512)
    assert text.tokenizer.get_vocab_size() == 512
    assert len(text.train.tokens) > 20 * len(text.heldout.tokens) / 5 > 10_000
    assert decoded(text, text.heldout) == [document.text for document in open_corpus(config) if document.heldout]
    assert "Ġself" in text.tokenizer.get_vocab()
    assert load_text(dataclasses.replace(config, sequence_length=32), 512).fingerprint == text.fingerprint
