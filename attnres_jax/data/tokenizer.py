"""The tokenizer: byte-level BPE, so that every text has tokens and gets back from them unchanged."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attnres_jax.data.corpus import DataError

END_OF_TEXT = "<|endoftext|>"
"""Stands before and after every document; its id is 0."""


@runtime_checkable
class GivenTokenizer(Protocol):
    """A tokenizer that is there already, as `load_text` needs it."""

    size: int
    """One more than the largest id."""
    digest: str
    """A hash of all that decides which tokens a document has."""

    def documents(self, texts: Iterable[str]) -> Iterator[Int32[np.ndarray, "n"]]:
        """Each text as a document, with what stands before and after one."""

    def token_bytes(self, vocab_size: int) -> Int32[np.ndarray, "V"]:
        """How many bytes of text each id stands for; 0 for special and unused ones."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` tokens: END_OF_TEXT, the 256 bytes, then merges.

    A small corpus may run out of merges before; the ids above are then never used.

    Raises:
      DataError: if `vocab_size` has no room for the bytes.
    """
    if vocab_size < 257:
        raise DataError(
            f"model.vocab_size={vocab_size} has no room for {END_OF_TEXT} and the 256 bytes; "
            "nearest: model.vocab_size=257"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return as_plain_text(tokenizer)


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Makes `tokenizer` read a literal `<|endoftext|>` in a text as the characters it is; a saved one forgets this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Int32[np.ndarray, "n"]]:
    """Each text as `END_OF_TEXT tokens END_OF_TEXT`."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    for chunk in chunks(texts):
        for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            yield np.array([end, *encoding.ids, end], np.int32)


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Int32[np.ndarray, "V"]:
    """How many bytes of text each id stands for; 0 for END_OF_TEXT and for ids that the tokenizer does not use."""
    sizes = np.zeros(vocab_size, np.int32)
    for token, index in tokenizer.get_vocab().items():
        if token != END_OF_TEXT:
            sizes[index] = len(token)  # The byte-level alphabet writes every byte as one character.
    return sizes


def chunks(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Lists of texts with about `characters` together: enough for all cores, little enough for memory."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
