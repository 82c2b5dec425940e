"""Schedules, chunks and transport as tables: nothing is computed."""

import itertools

import numpy as np
import pytest

from attnres_jax.depth import make_rule
from attnres_jax.models.plan import slots_of
from attnres_jax.parallel.schedules import IDLE, make_schedule, places
from attnres_jax.parallel.stages import cut_chunks, origins, rows
from attnres_jax.parallel.ticks import make_ticks
from attnres_jax.parallel.transport import cached_transmissions, naive_transmissions, windows

CASES = [
    ("gpipe", 2, 1, 3),
    ("gpipe", 4, 1, 8),
    ("1f1b", 2, 1, 5),
    ("1f1b", 4, 1, 3),
    ("1f1b", 4, 1, 16),
    ("interleaved_1f1b", 2, 2, 4),
    ("interleaved_1f1b", 4, 2, 16),
    ("interleaved_1f1b", 2, 3, 6),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_microbatch_goes_through_every_chunk_and_back(case):
    schedule = make_schedule(*case)
    forward, backward = schedule.times(schedule.forward), schedule.times(schedule.backward)
    assert (forward >= 0).all() and (backward >= 0).all()
    # What a stage makes is with its neighbour in the next tick, and is used there: nothing else is kept for it.
    assert (np.diff(forward, axis=1) == 1).all() and (np.diff(backward, axis=1) == -1).all()
    assert (backward[:, -1] >= forward[:, -1]).all()
    for table in (schedule.forward, schedule.backward):
        chunks = table[..., 1]
        own = np.broadcast_to(np.arange(schedule.stages), chunks.shape)
        assert (chunks[chunks != IDLE] % schedule.stages == own[chunks != IDLE]).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ticks_are_those_of_the_formula(case):
    name, stages, virtual, micros = case
    schedule = make_schedule(*case)
    busy = [int((table[..., 0] != IDLE).any(axis=1).sum()) for table in (schedule.forward, schedule.backward)]
    assert busy == [micros * virtual + stages - 1] * 2  # with F and B a tick each: (M V + P - 1)(F + B)
    shared = {"gpipe": 0}.get(name, micros * virtual + stages - stages * virtual)  # ticks that have both
    assert schedule.ticks == 2 * (micros * virtual + stages - 1) - shared


def in_flight(case):
    """The most microbatches at a time between their first chunk forward and their first backward."""
    schedule = make_schedule(*case)
    begins, ends = schedule.times(schedule.forward)[:, 0], schedule.times(schedule.backward)[:, 0]
    return max(places(list(zip(begins.tolist(), ends.tolist(), strict=True)))) + 1


def test_only_gpipe_keeps_more_microbatches_the_more_there_are():
    assert [in_flight(("gpipe", 4, 1, m)) for m in (8, 16, 64)] == [8, 16, 64]
    assert [in_flight(("1f1b", 4, 1, m)) for m in (8, 16, 64)] == [7, 7, 7]  # 2 P - 1
    assert len({in_flight(("interleaved_1f1b", 4, 2, m)) for m in (16, 32, 64)}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_places_are_shared_by_what_does_not_overlap(seed):
    draw = np.random.default_rng(seed)
    intervals = [(int(a), int(a + n)) for a, n in draw.integers(0, 20, (30, 2))]
    found = places(intervals)
    for (i, one), (j, other) in itertools.combinations(enumerate(intervals), 2):
        if found[i] == found[j]:
            assert one[1] < other[0] or other[1] < one[0]
    most = max(sum(a <= t <= b for a, b in intervals) for t in range(40))
    assert max(found) + 1 == most


@pytest.mark.parametrize(
    "case, message",
    [
        (("zigzag", 2, 1, 4), "schedule='zigzag' is unknown; known: gpipe, 1f1b, interleaved_1f1b"),
        (("1f1b", 2, 2, 4), "virtual_stages=2 is for interleaved_1f1b, not 1f1b; nearest: virtual_stages=1"),
        (
            ("interleaved_1f1b", 2, 1, 4),
            "virtual_stages=1 leaves interleaved_1f1b nothing to interleave; nearest: virtual_stages=2",
        ),
        (
            ("interleaved_1f1b", 4, 2, 6),
            "microbatches=6 (training.accumulation) is no multiple of 4 stages; nearest: 8",
        ),
    ],
)
def test_impossible_schedules(case, message):
    with pytest.raises(ValueError) as error:
        make_schedule(*case)
    assert str(error.value) == message


def block(size):
    return make_rule("block", size, 1e-6)


def sent(stages, virtual, transport, rule, layers):
    """Sources over all hops of one microbatch, counted in the sends of a schedule, in both directions."""
    chunks = cut_chunks(["gqa", "swiglu"] * layers, rule, stages * virtual)
    micros = 2 * stages
    schedule = make_schedule("1f1b" if virtual == 1 else "interleaved_1f1b", stages, virtual, micros)
    ticks = make_ticks(schedule, chunks, transport, has_stream=False)
    counts = []
    for backward, name in ((False, "forward"), (True, "backward")):
        options = [sum(count for count, _ in pattern) for pattern in ticks.sends[backward]]
        counts.append(sum(options[which] for which in ticks.rows[f"{name}.send"]) / micros)
    assert counts[0] == counts[1]
    return counts[0]


@pytest.mark.parametrize("stages, virtual", [(2, 1), (2, 2), (4, 1), (4, 2), (8, 2)])
def test_a_block_a_chunk_travels_as_often_as_the_equations_say(stages, virtual):
    chunks = stages * virtual
    assert sent(stages, virtual, "naive", block(2), chunks) == naive_transmissions(stages, virtual)
    assert sent(stages, virtual, "cached", block(2), chunks) == cached_transmissions(stages, virtual)
    # Under full, a chunk of one layer completes two sources.
    assert sent(stages, virtual, "naive", make_rule("full", 2, 1e-6), chunks) == naive_transmissions(
        stages, virtual, 2.0
    )
    full = sent(stages, virtual, "cached", make_rule("full", 2, 1e-6), chunks)
    assert full == cached_transmissions(stages, virtual, 2.0)


def test_the_papers_examples():
    assert sent(4, 2, "naive", block(2), 8) == 28 and sent(4, 2, "cached", block(2), 8) == 22
    # Its figure 3: a block spans two stages. With the embedding in every hop, as it is drawn there, six transmissions
    # are redundant; here the embedding does not travel, and two of those six are blocks.
    assert sent(4, 2, "naive", block(4), 8) - sent(4, 2, "cached", block(4), 8) == 2
    chunks = cut_chunks(["gqa", "swiglu"] * 8, block(4), 8)
    sizes = {name: np.diff(windows(chunks, 4, name))[1:, 0] for name in ("naive", "cached")}
    naive, cached = (sizes["naive"] + 1).tolist(), (sizes["cached"] + (np.arange(1, 8) < 4)).tolist()
    assert naive == [1, 2, 2, 3, 3, 4, 4] and cached == [1, 2, 2, 2, 2, 2, 2]
    assert sum(naive) - sum(cached) == 6


def test_a_stage_gets_all_that_it_reads():
    """Following the sends: before each chunk every stage has had every source that is complete."""
    cases = itertools.product((2, 4), (1, 2), (2, 4), (8, 16), ("naive", "cached"))
    for stages, virtual, size, layers, transport in cases:
        chunks = cut_chunks(["gqa", "swiglu"] * layers, block(size), stages * virtual)
        spans, has = windows(chunks, stages, transport), [{0} for _ in range(stages)]
        for index, chunk in enumerate(chunks):
            own = has[index % stages]
            own |= set(range(*spans[index]))
            assert own >= set(range(chunk.num_valid)), (stages, virtual, size, layers, transport, index)
            own |= set(range(chunk.num_valid, chunk.num_valid + chunk.appended))


def test_blocks_within_and_across_chunks():
    plan = ["gqa", "swiglu"] * 6
    within = cut_chunks(plan, block(2), 2)
    assert [len(chunk.segments) for chunk in within] == [1, 1] and not any(chunk.opened for chunk in within)
    assert {chunk.structure for chunk in within} == {0}
    spanning = cut_chunks(plan, block(12), 3)
    assert [(c.segments[0].opened, c.segments[-1].closed) for c in spanning] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert [chunk.appended for chunk in spanning] == [0, 0, 1]


def test_the_last_chunk_may_be_shorter_and_kinds_may_differ():
    attention = (["kda"] * 3 + ["mla"]) * 7
    plan = [kind for layer in range(27) for kind in (attention[layer], "moe" if layer else "swiglu")]
    chunks = cut_chunks(plan, block(6), 4)
    assert [chunk.num_sites for chunk in chunks] == [14, 14, 14, 12]
    assert sum(chunk.appended for chunk in chunks) == 9  # 27 layers, three to a block
    for kind in set(plan):
        table, where = rows(chunks, 4, kind), origins(chunks, 4, kind)
        np.testing.assert_array_equal(table.reshape(-1)[where], np.arange(plan.count(kind)))
    sites = [site for chunk in chunks for site in range(chunk.first_site, chunk.first_site + chunk.num_sites)]
    assert sites == list(range(54))
    slots = slots_of(plan)
    for chunk in chunks:
        for kind, own in chunk.stacks.items():
            want = [slots[s] for s in range(chunk.first_site, chunk.first_site + chunk.num_sites) if plan[s] == kind]
            assert own == want


@pytest.mark.parametrize(
    "rule, layers, chunks, message",
    [
        ("block", 3, 4, "3 layers in 4 runs of 1 leave the last without any; nearest: 3 runs"),
        ("block", 9, 8, "9 layers in 8 runs of 2 leave the last without any; nearest: 5 runs"),
        (
            "rms_block",
            6,
            3,
            "3 runs of 2 layers cut blocks of 6 sublayers, which only the rule 'block' allows; nearest: 2 runs",
        ),
    ],
)
def test_what_cannot_be_cut(rule, layers, chunks, message):
    with pytest.raises(ValueError) as error:
        cut_chunks(["gqa", "swiglu"] * layers, make_rule(rule, 6, 1e-6), chunks)
    assert str(error.value) == message
