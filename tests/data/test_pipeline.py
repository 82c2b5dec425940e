import dataclasses
import functools
import itertools
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_jax.config import DataConfig
from attnres_jax.data import (
    TextData,
    TokenDocuments,
    heldout_batches,
    load_text,
    train_iterator,
    train_tokenizer,
)

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=8)


@functools.cache
def tokenizer():
    return train_tokenizer(["text"], 257)


def numbered(lengths):
    """Documents whose tokens are 1, 2, 3, ... throughout: the pair (n, n + 1) names its place."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    documents = TokenDocuments(np.arange(1, offsets[-1] + 1), offsets)
    sizes = np.ones(offsets[-1] + 1, np.int32)
    return TextData(
        train=documents, heldout=documents, tokenizer=tokenizer(), token_bytes=sizes, fingerprint="numbered"
    )


def firsts(text):
    return {int(offset) + 1: index for index, offset in enumerate(text.train.offsets[:-1])}


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b)
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def documents_of(text, batches):
    """The documents that a stream of batches reads, in order; checks every pair, segment and position on the way."""
    order, previous, begins = [], None, firsts(text)
    last = set((text.train.offsets[1:] - 1).tolist())
    for row in itertools.chain.from_iterable(zip(*batch.values(), strict=True) for batch in batches):
        row = dict(zip(batches[0], row, strict=True))
        segment, position = 0, 0
        for column, (token, target) in enumerate(zip(row["inputs"].tolist(), row["targets"].tolist(), strict=True)):
            assert target == token + 1
            if previous is None or previous in last:  # The document before is complete, so another begins.
                order.append(begins[token])
            else:
                assert token == previous + 1
            new = column == 0 or token in begins
            segment, position = segment + new, 0 if new else position + 1
            assert (row["segment_ids"][column], row["positions"][column]) == (segment, position)
            previous = token
    return order


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 24), st.integers(1, 3), st.integers(0, 2**40))
def test_every_token_is_a_target_once_an_epoch_and_segments_never_mix(lengths, length, batch_size, seed):
    text, config = numbered(lengths), DataConfig(sequence_length=length, batch_size=batch_size)
    pairs = sum(lengths) - len(lengths)
    batches = take(train_iterator(text, config, seed=seed), -(-2 * pairs // (length * batch_size)))
    order = documents_of(text, batches)
    everything = list(range(len(lengths)))
    assert sorted(order[: len(lengths)]) == everything
    assert sorted(order[len(lengths) : 2 * len(lengths)]) == everything
    stream = np.concatenate([batch["targets"].ravel() for batch in batches])
    for epoch in range(2):
        seen = stream[epoch * pairs : (epoch + 1) * pairs]
        assert sorted(seen) == sorted(set(range(1, sum(lengths) + 1)) - set(firsts(text)))
    assert all((batch["weights"] == 1).all() for batch in batches)


def test_batch_shapes_and_types(small):
    text, config = small
    batch = next(train_iterator(text, config, seed=0))
    types = {"inputs": "i4", "targets": "i4", "segment_ids": "i4", "positions": "i4", "weights": "f4"}
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        key: (np.dtype(kind), (4, 16)) for key, kind in types.items()
    }
    assert {key: (value.dtype, value.shape) for key, value in heldout_batches(text, config, 4)[0].items()} == {
        key: (value.dtype, value.shape) for key, value in batch.items()
    }


def test_shuffling_follows_seed_and_epoch():
    text, config = numbered([3] * 50), DataConfig(sequence_length=100, batch_size=1)

    def epochs(seed):  # A row is an epoch.
        return [tuple(documents_of(text, [batch])) for batch in take(train_iterator(text, config, seed=seed), 3)]

    assert epochs(0) == epochs(0)
    orders = [order for seed in range(3) for order in epochs(seed)]
    assert len(set(orders)) == 9
    assert tuple(range(50)) not in orders


@settings(max_examples=15, deadline=None)
@given(LENGTHS, st.integers(1, 12))
def test_restored_iterator_goes_on_bitwise(lengths, length):
    text, config = numbered(lengths), DataConfig(sequence_length=length, batch_size=2)
    make = functools.partial(train_iterator, text, config, seed=3)
    iterator, states, batches = make(), [], []
    for _ in range(15):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert max(map(len, states)) < 1000
    for step, state in enumerate(states[:12]):
        fresh = make()
        fresh.set_state(json.loads(state))
        assert json.dumps(fresh.get_state()) == state
        assert_same(take(fresh, 3), batches[step : step + 3])
        iterator.set_state(json.loads(state))  # One that has been used goes back as well.
        assert_same(take(iterator, 3), batches[step : step + 3])


def test_iterator_survives_a_rebuilt_cache(small):
    text, config = small
    expected = take(train_iterator(text, config, seed=0), 10)
    again = load_text(dataclasses.replace(config, cache_dir=config.cache_dir + "2"), 300)
    assert_same(take(train_iterator(again, config, seed=0), 10), expected)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 24), st.integers(1, 4))
def test_heldout_holds_every_token_in_order(lengths, length, batch_size):
    text, config = numbered(lengths), DataConfig(sequence_length=length, batch_size=batch_size)
    pairs = sum(lengths) - len(lengths)
    batches = heldout_batches(text, config, 10_000)
    assert len(batches) == -(-pairs // (length * batch_size))
    flat = {key: np.concatenate([batch[key].ravel() for batch in batches]) for key in batches[0]}
    real = flat["weights"] == 1
    assert real[:pairs].all() and not real[pairs:].any()
    assert not any(values[pairs:].any() for values in flat.values())
    tokens = [token for token in range(1, sum(lengths) + 1) if token not in firsts(text)]
    assert flat["targets"][:pairs].tolist() == tokens
    starts = firsts(text)
    for batch in batches:
        for inputs, segments, positions, weights in zip(
            *(batch[key] for key in ("inputs", "segment_ids", "positions", "weights")), strict=True
        ):
            segment = position = 0
            for column in range(int(weights.sum())):
                new = column == 0 or int(inputs[column]) in starts
                segment, position = segment + new, 0 if new else position + 1
                assert (segments[column], positions[column]) == (segment, position)


def test_heldout_is_fixed_in_size_and_spread_over_the_split():
    text, config = numbered([11] * 100), DataConfig(sequence_length=10, batch_size=4)
    batches = heldout_batches(text, config, 10)
    assert_same(batches, heldout_batches(text, config, 10))
    assert [batch["weights"].sum() for batch in batches] == [40, 40, 20]
    assert [batch["inputs"].shape for batch in batches] == [(4, 10)] * 3
    first = [int(row[0]) for batch in batches for row in batch["inputs"]]
    assert first == [1 + 110 * index for index in range(10)] + [0, 0]


def test_bytes_of_the_targets_are_the_bytes_of_the_text(small):
    text, config = small
    batches = heldout_batches(text, config, 10_000)
    counted = sum((text.token_bytes[batch["targets"]] * batch["weights"]).sum() for batch in batches)
    assert counted == sum(len(text.tokenizer.decode(document.tolist()).encode()) for document in text.heldout)
