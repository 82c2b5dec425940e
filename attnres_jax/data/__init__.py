"""Text as token batches: corpora, the tokenizer, the cache of both, and the packed pipeline."""

from attnres_jax.data.corpus import Corpus, DataError, Document, open_corpus
from attnres_jax.data.pipeline import heldout_batches, train_iterator
from attnres_jax.data.text import TextData, TokenDocuments, cache_dir, load_text
from attnres_jax.data.tokenizer import END_OF_TEXT, GivenTokenizer, chunks, token_bytes, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Corpus",
    "DataError",
    "Document",
    "GivenTokenizer",
    "TextData",
    "TokenDocuments",
    "cache_dir",
    "chunks",
    "heldout_batches",
    "load_text",
    "open_corpus",
    "token_bytes",
    "train_iterator",
    "train_tokenizer",
]
