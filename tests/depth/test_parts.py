"""A stack run in parts, forward and then backward part by part as a pipeline does it, against the stack as a whole."""

import functools

import jax
import jax.numpy as jnp
import pytest
from numerics import worst
from toy_stacks import PLAN, call, draw, means_of, scanned, value_and_gradients

from attnres_jax.depth import Options, Part, Place, Window, depth_scan, make_rule, num_appended
from attnres_jax.models.plan import cut

FIRST = 2  # sublayers of the first part
FAST = [
    ("block", {"weights": "sigmoid", "key_norm": False, "heads": 2, "window": 2, "recency_bias": -1.0}),
    ("full", {"heads": 3}),
    ("delta", {}),
]
SLOW = [
    ("block", {"query": "none", "window": 1, "recency_bias": 0.5}),
    ("block", {"query": "input", "sum_sources": True}),
    ("rms_block", {"recency_bias": 1.5}),
    ("delta_block", {}),
    ("denseformer", {}),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("name, options", CASES)
def test_parts_are_the_whole_in_float64(name, options):
    with jax.enable_x64(True):
        rule = make_rule(name, 2, 1e-6, Options(**options))
        stacks, sites, embedding, context = draw(rule)
        expected = value_and_gradients(functools.partial(scanned, rule, context, "full"), stacks, sites, embedding)
        found = jax.jit(functools.partial(in_parts, rule, context))(stacks, sites, embedding)
        assert worst(found, expected) < 1e-12


def in_parts(rule, context, stacks, sites, embedding):
    """What `value_and_gradients` returns of `scanned`, one part after the other."""
    plans = PLAN[:FIRST], PLAN[FIRST:]
    segments = [cut(plan, rule.block_size) for plan in plans]
    slots, first = 1 + num_appended(rule, cut(PLAN, rule.block_size)), 2 if rule.windowed else 0
    window = Window(jnp.int32(first), slots) if rule.windowed else None
    # Around the window lie the sources of other passes, which are no business of this one.
    values = jnp.full((slots + 2 * first, *embedding.shape), 1e3).at[first].set(embedding)

    def run(index, complete, known, stacks, sites, values, stream):
        num_valid = 1 + index * num_appended(rule, segments[0])
        place = Place(index * FIRST, num_valid, len(plans[index]), window)
        part = Part(place, {kind: index * FIRST // 2 for kind in stacks}, complete, known)
        return depth_scan(
            rule, segments[index], call, stacks, sites, stream, None, context, remat="full", part=part, sources=values
        )

    stream, begin_back = jax.vjp(lambda embedding: rule.begin(sites, embedding)[0], embedding)
    streams, reports, known = [stream], [], []
    for index in (0, 1):
        stream, values, report, _, kept = run(index, False, None, stacks, sites, values, streams[-1])
        streams.append(stream)
        reports.append(report)
        known.append(kept)

    place = Place(len(PLAN), slots - 1, 1)
    own, bank, _ = rule.enter(sites, values[first : first + slots - 1], place)
    read = lambda own, stream, newest, bank: rule.readout(own, stream, newest, bank)  # noqa: E731
    h, read_back = jax.vjp(read, own, streams[-1], values[first + slots - 1], bank)
    means, means_back = jax.vjp(lambda first, second: means_of([*first, *second]), *reports)
    h_bar, means_bar = (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in (h, means))

    own_bar, stream_bar, newest_bar, bank_bar = read_back(h_bar)
    sites_bar, sources_bar = rule.enter_transpose(sites, place, own_bar, rule.sources(bank_bar))
    values_bar = jnp.zeros_like(values).at[first : first + slots - 1].set(sources_bar)
    values_bar = values_bar.at[first + slots - 1].set(newest_bar)
    reports_bar = means_back(means_bar)
    stacks_bar = jax.tree.map(jnp.zeros_like, stacks)
    for index in (1, 0):
        again = functools.partial(run, index, True, known[index])
        _, back = jax.vjp(again, stacks, sites, values, streams[index])
        stacks_bar, own_bar, values_bar, stream_bar = back(
            (stream_bar, values_bar, reports_bar[index], stacks_bar, None)
        )
        sites_bar = jax.tree.map(jnp.add, sites_bar, own_bar)
    embedding_bar = values_bar[first]
    if streams[0] is not None:
        embedding_bar += begin_back(stream_bar)[0]
    return (h, means), (stacks_bar, sites_bar, embedding_bar)
