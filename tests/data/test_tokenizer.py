import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attnres_jax.data import END_OF_TEXT, DataError, token_bytes, train_tokenizer
from attnres_jax.data.tokenizer import encode_documents

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "naïve façade, 数据数据 🙂🙂", END_OF_TEXT * 50]
TOKENIZER = train_tokenizer(TEXTS, 400)


@given(st.text())
@example(END_OF_TEXT)
@example(" leading and trailing \r\n\t")
@example("\x00\u0301é\U0010ffff")
def test_text_comes_back_and_its_bytes_are_counted(text):
    (document,) = encode_documents(TOKENIZER, [text])
    assert document[0] == document[-1] == 0 and 0 not in document[1:-1]
    assert TOKENIZER.decode(document.tolist()) == text
    assert token_bytes(TOKENIZER, 400)[document[1:]].sum() == len(text.encode())


def test_vocabulary():
    assert TOKENIZER.token_to_id(END_OF_TEXT) == 0
    assert 257 < TOKENIZER.get_vocab_size() <= 400
    sizes = token_bytes(TOKENIZER, 400)
    assert sizes.dtype == np.int32 and sizes.shape == (400,) and sizes[0] == 0
    assert (sizes[1:257] == 1).all() and sizes.max() > 1


def test_corpus_with_fewer_merges_than_asked_leaves_ids_unused():
    tokenizer = train_tokenizer(["ab"], 300)
    assert tokenizer.get_vocab_size() == 258
    assert token_bytes(tokenizer, 300)[257:].tolist() == [2] + [0] * 42


def test_training_is_repeatable():
    assert train_tokenizer(TEXTS, 400).to_str() == TOKENIZER.to_str()


def test_documents_keep_their_order_whatever_their_size():
    texts = ["a" * n for n in (3, 1 << 21, 0, 5)]
    assert [TOKENIZER.decode(document.tolist()) for document in encode_documents(TOKENIZER, texts)] == texts


def test_vocabulary_too_small_for_the_bytes():
    with pytest.raises(DataError, match=r"model.vocab_size=256 .*nearest: model.vocab_size=257"):
        train_tokenizer(TEXTS, 256)
