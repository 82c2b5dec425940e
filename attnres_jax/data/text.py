"""A corpus as tokens: trained, encoded once, and kept in a cache that can be killed, shared or damaged without harm."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, Integer
from tokenizers import Tokenizer

from attnres_jax.config import DataConfig
from attnres_jax.data.corpus import Corpus, DataError, open_corpus
from attnres_jax.data.tokenizer import (
    GivenTokenizer,
    as_plain_text,
    encode_documents,
    token_bytes,
    train_tokenizer,
)

_FORMAT = 1  # Goes up when the stored files, or what is done to the text before, change.
_SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Token documents, stored end to end and mapped from disk; a random-access source for grain."""

    tokens: Integer[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "documents_and_one"]
    """Document i is `tokens[offsets[i]:offsets[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int32[np.ndarray, "n"]:
        return np.array(self.tokens[self.offsets[index] : self.offsets[index + 1]], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """What training and evaluation read."""

    train: TokenDocuments
    heldout: TokenDocuments
    tokenizer: Tokenizer | GivenTokenizer
    token_bytes: Int32[np.ndarray, "V"]
    """Bytes of text that each token stands for; 0 for special and unused ones."""
    fingerprint: str
    """Of documents, split, vocabulary size, a given tokenizer and the format: equal ones hold equal tokens."""


def load_text(config: DataConfig, vocab_size: int, tokenizer: GivenTokenizer | None = None) -> TextData:
    """The corpus of `config` in tokens of `tokenizer`, or of one that is trained on its train split.

    Made at the first call and read from `config.cache_dir` by later ones, of this process or any other. What is there
    but does not match its own checksums is made again.

    Raises:
      DataError: if the corpus, the vocabulary size or the cache folder cannot be used, or `config` names a tokenizer
        and it is not given.
    """
    if config.tokenizer and not tokenizer:
        raise DataError(
            f"data.tokenizer={config.tokenizer!r} is to be given, loaded; of a run, restore_text(workdir) does it"
        )
    if tokenizer and tokenizer.size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} has no room for the ids of data.tokenizer={config.tokenizer!r}; "
            f"nearest: model.vocab_size={tokenizer.size}"
        )
    corpus = open_corpus(config)
    parts = [_FORMAT, vocab_size, corpus.digest(), *([tokenizer.digest] if tokenizer else [])]
    fingerprint = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
    cache = cache_dir(config)
    for _ in range(3):  # More than once only if another process replaces a damaged copy at this moment.
        text = _read(cache / fingerprint, vocab_size, fingerprint, tokenizer)
        if text is not None:
            return text
        what = "encoding the text" if tokenizer else f"training a tokenizer of {vocab_size} tokens"
        logging.getLogger(__name__).info("%s into %s", what, cache / fingerprint)
        try:
            _make(cache, fingerprint, corpus, vocab_size, tokenizer)
        except OSError as error:
            raise DataError(
                f"data.cache_dir={str(cache)!r} cannot be written: {error.strerror}; name another"
            ) from None
    raise DataError(f"data.cache_dir={str(cache)!r} does not keep what is written to it; name another")


def cache_dir(config: DataConfig) -> Path:
    """Where trained tokenizers, tokens and compiled programs are kept between runs."""
    return Path(config.cache_dir or os.environ.get("ATTNRES_CACHE") or "~/.cache/attnres_jax").expanduser()


def _make(cache: Path, fingerprint: str, corpus: Corpus, vocab_size: int, given: GivenTokenizer | None) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".making_*"):  # By a process that was killed; none takes a day.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".making_", dir=cache, ignore_cleanup_errors=True) as folder:
        _write(Path(folder, "text"), corpus, vocab_size, given)
        _publish(Path(folder, "text"), cache / fingerprint, Path(folder, "replaced"))


def _write(folder: Path, corpus: Corpus, vocab_size: int, given: GivenTokenizer | None) -> None:
    folder.mkdir()
    if given is None:
        tokenizer = train_tokenizer((document.text for document in corpus if not document.heldout), vocab_size)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        encode = functools.partial(encode_documents, tokenizer)
    else:
        encode = given.documents
    for split in _SPLITS:
        heldout = split == "heldout"
        texts = (document.text for document in corpus if document.heldout is heldout)
        _write_documents(folder, split, encode(texts), vocab_size)
    checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / "checksums.json").write_text(json.dumps(checksums, indent=1))


def _write_documents(folder: Path, split: str, documents: Iterable[Int32[np.ndarray, "_"]], vocab_size: int) -> None:
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    documents = [document.astype(dtype) for document in documents]
    np.save(folder / f"{split}_tokens.npy", np.concatenate(documents))
    np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *map(len, documents)], dtype=np.int64))


def _publish(made: Path, final: Path, replaced: Path) -> None:
    """Renames `made` to `final`, whole or not at all; what stands there is another process's work or damaged."""
    if final.exists() and not _sound(final):
        with contextlib.suppress(FileNotFoundError):  # Another process moved it away first.
            os.replace(final, replaced)
    with contextlib.suppress(OSError):  # Another process published first; the caller reads what stands there.
        os.replace(made, final)


def _read(folder: Path, vocab_size: int, fingerprint: str, given: GivenTokenizer | None) -> TextData | None:
    """What `_write` wrote, or None if it is absent or damaged."""
    try:
        if not _sound(folder):
            return None
        if given is None:
            trained = as_plain_text(Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8")))
        splits = {
            split: TokenDocuments(
                np.load(folder / f"{split}_tokens.npy", mmap_mode="r"), np.load(folder / f"{split}_offsets.npy")
            )
            for split in _SPLITS
        }
    except OSError:  # Replaced by another process while it was read.
        return None
    sizes = token_bytes(trained, vocab_size) if given is None else given.token_bytes(vocab_size)
    return TextData(**splits, tokenizer=given or trained, token_bytes=sizes, fingerprint=fingerprint)


def _sound(folder: Path) -> bool:
    """Whether every file is there and as it was written."""
    try:
        checksums = json.loads((folder / "checksums.json").read_bytes())
        return bool(checksums) and all(_checksum(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
