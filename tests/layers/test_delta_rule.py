"""The three forms of the gated delta rule, held together; NumPy float64 for the definition itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import HIGHEST, equations, precisions, worst

from attnres_jax.layers import delta_chunks, delta_rule_chunkwise, delta_rule_recurrence, delta_rule_step, delta_tiles
from attnres_jax.layers.delta_algebra import Plan

LENGTHS = (1, 63, 64, 65)
FORGETTING = ("mild", "slow", "edge", "bound", "strong", "mixed")
chunkwise = functools.partial(delta_rule_chunkwise, chunk=64)  # as the models', whose heads are wider
IN_TILES = {"none", "mild", "slow", "edge", "bound"}  # the others are taken level by level


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_decays(rng, kind, shape):
    """Up to 200 a step; `mixed` puts steps of 200 next to steps of 0.001, where a difference of sums has no digits.

    `edge` does the same within what is still taken from a tile's middle: one step of 39 in every half of 16 tokens.
    `bound` is as far as Kimi K3's gate goes, at every step: what a decay's gradient is made of is small everywhere.
    """
    if kind == "bound":
        return np.full(shape, -5.0)
    if kind == "edge":
        steps = rng.exponential(0.01, shape)
        steps[:, rng.integers(0, 8) :: 8] = 39
        return -steps
    if kind == "mixed":
        return -np.where(rng.random(shape) < 0.2, rng.uniform(0, 200, shape), rng.exponential(0.01, shape))
    return (
        -rng.exponential({"mild": 0.2, "slow": 1e-4}.get(kind, 1), shape)
        if kind != "strong"
        else -rng.uniform(0, 200, shape)
    )


def example(length, kind="mild", *, equal_keys=False, batch=2, heads=2, keys=6, values=5, seed=0):
    """q, k, v, log_decay, beta, initial state; float64."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads)
    k = unit(rng.normal(size=(*shape, keys)))
    if equal_keys:
        k = np.broadcast_to(k[:, :1], k.shape)
    beta = 1 - 1e-4 * rng.random(shape) if equal_keys else rng.random(shape)
    log_decay = np.zeros((*shape, keys)) if kind == "none" else log_decays(rng, kind, (*shape, keys))
    values_of = rng.normal(size=(*shape, values))
    return (
        unit(rng.normal(size=(*shape, keys))),
        k,
        values_of,
        log_decay,
        beta,
        rng.normal(size=(batch, heads, keys, values)),
    )


def by_hand(q, k, v, log_decay, beta, state):
    """Equation 1 as written: S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T."""
    read, state = np.zeros_like(v), state.copy()
    for b, h in np.ndindex(state.shape[:2]):
        for t in range(q.shape[1]):
            key = k[b, t, h]
            keep = (np.eye(len(key)) - beta[b, t, h] * np.outer(key, key)) @ np.diag(np.exp(log_decay[b, t, h]))
            state[b, h] = keep @ state[b, h] + beta[b, t, h] * np.outer(key, v[b, t, h])
            read[b, t, h] = state[b, h].T @ q[b, t, h] / np.sqrt(len(key))
    return read, state


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(form, inputs, segment_ids=None):
    """(reads, final state), and the gradients of a scalar of both."""

    def scalar(*inputs):
        read, state = form(*inputs, segment_ids)
        return jnp.sum(jnp.sin(3 * read)) + jnp.sum(jnp.cos(state)), (read, state)

    gradients, out = jax.grad(scalar, argnums=range(6), has_aux=True)(*inputs)
    return out, gradients


def test_recurrence_is_equation_1(x64):
    inputs = example(9)
    assert worst(delta_rule_recurrence(*map(jnp.asarray, inputs)), by_hand(*inputs)) < 1e-14


def test_steps_are_the_recurrence(x64):
    inputs = [jnp.asarray(x) for x in example(7)]
    state, reads = inputs[-1], []
    for t in range(7):
        read, state = delta_rule_step(*(x[:, t] for x in inputs[:-1]), state)
        reads.append(read)
    assert worst((jnp.stack(reads, 1), state), delta_rule_recurrence(*inputs)) < 1e-15


@pytest.mark.parametrize("kind", ["none", *FORGETTING])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence_in_float64(x64, length, kind):
    """Values, state and every gradient, with a state given."""
    inputs = example(length, kind, equal_keys=kind == "none")
    expected = with_gradients(delta_rule_recurrence, inputs)
    assert worst(with_gradients(chunkwise, inputs), expected) < 1e-12


@pytest.mark.parametrize("kind", ["none", *FORGETTING])
def test_which_form_takes_which_decays(kind):
    log_decay = jnp.asarray(example(128, kind)[3], jnp.float32)
    assert bool(delta_tiles.is_mild(Plan(64, 2, 1), log_decay, jnp.float32)) == (kind in IN_TILES)
    bounded = jnp.full_like(log_decay, -5)  # by Kimi K3's gate
    assert delta_tiles.is_mild(Plan(64, 2, 1), bounded, jnp.float32)
    assert not delta_tiles.is_mild(Plan(64, 2, 1), log_decay.at[1, 70, 1, 3].set(-jnp.inf), jnp.float32)


def test_bounded_decays_compile_one_form_alone(x64):
    inputs = [np.maximum(x, -5) if i == 3 else x for i, x in enumerate(example(150, "strong"))]
    bounded = functools.partial(chunkwise, lower_bound=-5.0)
    expected = with_gradients(delta_rule_recurrence, inputs)
    assert worst(with_gradients(bounded, inputs), expected) < 1e-12

    def choices(lower_bound):
        form = functools.partial(chunkwise, lower_bound=lower_bound)
        return str(jax.make_jaxpr(lambda *x: with_gradients.__wrapped__(form, x))(*inputs)).count("cond[")

    assert [choices(bound) for bound in (None, -5.2, -5.0)] == [2, 2, 0]


@pytest.mark.parametrize("kind", ["none", "mild"])
def test_levels_take_mild_decays_too(x64, kind, monkeypatch):
    monkeypatch.setattr(delta_tiles, "is_mild", lambda *_: jnp.asarray(False))
    inputs = example(150, kind)
    by_level = lambda *inputs: chunkwise(*inputs)  # noqa: E731  (a program of its own)
    expected = with_gradients(delta_rule_recurrence, inputs)
    assert worst(with_gradients(by_level, inputs), expected) < 1e-12


@pytest.mark.parametrize("kind", ["mild", "mixed"])
@pytest.mark.parametrize(("chunk", "group"), [(2, 3), (16, 1), (32, 2), (64, 8), (128, 1)])
def test_any_chunk_and_group(x64, chunk, group, kind):
    inputs = example(150, kind, batch=1)
    form = functools.partial(delta_rule_chunkwise, chunk=chunk, group=group)
    assert worst(with_gradients(form, inputs), with_gradients(delta_rule_recurrence, inputs)) < 1e-12


@pytest.mark.parametrize(("keys", "chunk"), [(6, 16), (64, 32), (96, 64), (128, 64), (256, 64)])
def test_a_chunk_is_half_as_long_as_keys_are_wide(keys, chunk):
    inputs = example(128, batch=1, heads=1, keys=keys)
    programs = [
        str(jax.make_jaxpr(functools.partial(delta_rule_chunkwise, chunk=size))(*inputs)) for size in (None, chunk)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize(("where", "heads", "group"), [("cpu", 2, 4), ("cpu", 4, 2), ("cpu", 24, 1), ("tpu", 24, 4)])
def test_chunks_at_a_time(where, heads, group, monkeypatch):
    """Of 64 KiB at most on CPU."""
    monkeypatch.setattr(delta_chunks, "platform", lambda: where)
    inputs = [jnp.asarray(x, jnp.float32) for x in example(256, batch=1, heads=heads, keys=64)]
    programs = [
        str(jax.make_jaxpr(functools.partial(delta_rule_chunkwise, group=size))(*inputs)) for size in (None, group)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("kind", FORGETTING)
@pytest.mark.parametrize("equal_keys", [False, True])
@pytest.mark.parametrize("length", [65, 200])
def test_float32_chunks_against_the_float64_recurrence(length, kind, equal_keys):
    """Finite and equal to 1e-5 in every output and every gradient, each in its own norm."""
    inputs = example(length, kind, equal_keys=equal_keys)
    with jax.enable_x64(True):
        # Of the same numbers: what rounding the inputs changes is not the method's.
        inputs = [np.float64(np.float32(x)) for x in inputs]
        expected = jax.tree.map(np.asarray, with_gradients(delta_rule_recurrence, inputs))
    found = with_gradients(chunkwise, [jnp.asarray(x, jnp.float32) for x in inputs])
    assert all(x.dtype == jnp.float32 and bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert worst(jax.tree.map(np.float64, found), expected) < 1e-5


def test_small_numbers_keep_their_digits():
    """Decays at the edge of the form in tiles, and numbers as loss scales and the ends of trainings have them."""
    *row, state = example(130, "edge")
    inputs = [jnp.asarray(x, jnp.float32) for x in (*row[:2], 1e-12 * row[2], *row[3:], 1e-12 * state)]

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form, *inputs):
        return jax.grad(lambda *x: 1e-9 * sum(jnp.sum(jnp.cos(3e12 * y)) for y in form(*x)), argnums=range(6))(*inputs)

    expected = gradients(delta_rule_recurrence, *inputs)
    assert worst(gradients(chunkwise, *inputs), expected) < 2e-5


@pytest.mark.parametrize("value", [-200.0, -1e6, -np.inf])
def test_everything_forgotten_at_every_step(value):
    """A token then reads its own value alone; no gradient is NaN."""
    q, k, v, log_decay, beta, state = (jnp.asarray(x, jnp.float32) for x in example(70))
    inputs = (q, k, v, jnp.full_like(log_decay, value), beta, state)
    (read, after), gradients = with_gradients(chunkwise, inputs)
    alone = jnp.sum(q * k, -1) * beta / np.sqrt(q.shape[-1])
    np.testing.assert_allclose(read, alone[..., None] * v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        after, beta[:, -1, :, None, None] * k[:, -1, :, :, None] * v[:, -1, :, None], rtol=1e-5, atol=1e-6
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("form", "kind"),
    [(delta_rule_recurrence, "mixed"), (chunkwise, "mixed"), (chunkwise, "mild")],
)
def test_packed_documents_equal_the_same_documents_alone(x64, form, kind):
    """Values and gradients; documents that end inside a chunk, at its end, and of one token."""
    lengths = [5, 59, 1, 64, 20, 1]
    inputs = example(sum(lengths), kind, batch=1)
    segment_ids = jnp.asarray(np.repeat([7, 3, 4, 7, 2, 9], lengths))[None]
    (read, state), packed = with_gradients(form, inputs, segment_ids)
    starts = np.cumsum([0, *lengths])
    for first, last in itertools.pairwise(starts):
        own = [x[:, first:last] for x in inputs[:-1]]
        initial = inputs[-1] if first == 0 else np.zeros_like(inputs[-1])

        def scalar(*own, is_last=last == starts[-1], initial=initial):
            given = own[-1] if len(own) == 6 else initial
            read, state = delta_rule_recurrence(*own[:5], given)
            return jnp.sum(jnp.sin(3 * read)) + is_last * jnp.sum(jnp.cos(state)), (read, state)

        alone, (own_read, own_state) = jax.grad(scalar, argnums=range(6), has_aux=True)(*own, initial)
        assert worst(read[:, first:last], own_read) < 1e-12
        bars = [np.array(x[:, first:last]) for x in packed[:-1]]
        wanted = [np.array(x) for x in alone[:-1]]
        if first:
            wanted[3][:, 0] = 0  # what the first token of a document keeps of the one before is no one's choice
        assert worst(bars, wanted) < 1e-12
        if first == 0:
            assert worst(packed[-1], alone[-1]) < 1e-12
    assert worst(state, own_state) < 1e-12


@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_rows_of_different_documents(x64, kind):
    inputs = example(150, kind)
    segment_ids = jnp.asarray(np.stack([np.repeat([1, 2, 3], [70, 16, 64]), np.repeat([5, 4], [1, 149])]))
    expected = with_gradients(delta_rule_recurrence, inputs, segment_ids)
    assert worst(with_gradients(chunkwise, inputs, segment_ids), expected) < 1e-12


def test_gradients_are_causal(x64):
    """A token's read does not depend on later tokens, and does on earlier ones."""
    inputs = [jnp.asarray(x, jnp.float32) for x in example(70, batch=1, heads=1)]
    for t in (0, 15, 16, 40, 63, 69):
        read_at = lambda *inputs, t=t: jnp.sum(chunkwise(*inputs)[0][:, t])  # noqa: E731
        for bar in jax.grad(read_at, argnums=(1, 2, 4))(*inputs):
            size = np.abs(bar).reshape(70, -1).max(-1)
            assert (size[: t + 1] > 0).all() and (size[t + 1 :] == 0).all()


def test_half_precision():
    """bfloat16 in and out, the state float32, and no worse than rounding the inputs makes it."""
    exact = example(130)
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in exact[:3]] + [jnp.asarray(x, jnp.float32) for x in exact[3:]]
    (read, state), gradients = with_gradients(chunkwise, inputs)
    assert read.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]
    expected = with_gradients(delta_rule_recurrence, [x.astype(jnp.float32) for x in inputs])
    widened = jax.tree.map(jnp.float32, ((read, state), gradients))
    assert worst(widened, expected) < 1e-2


def test_the_derivative_keeps_no_pairwise_decays():
    """Between the passes: the inputs, and a chunk and head a state [K, V], V' [C, V] and two matrices [C, C]."""
    batch, length, heads, keys, values, chunk = 1, 256, 2, 24, 20, 64
    inputs = [jnp.asarray(x, jnp.float32) for x in example(length, batch=batch, heads=heads, keys=keys, values=values)]
    _, pullback = jax.vjp(lambda *x: chunkwise(*x, group=2), *inputs)
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    row = sum(x.size for x in inputs)
    assert kept <= row + length // chunk * heads * batch * (keys * values + chunk * (values + 2 * chunk)) + 16


def test_no_array_of_the_program_has_a_decay_for_every_pair_of_a_chunk():
    """No value of either pass, within loops too, is as large as [C, C, K] for each chunk and head in hand."""
    inputs = [jnp.asarray(x, jnp.float32) for x in example(128, batch=1, heads=1, keys=32, values=32)]
    form = lambda *x: chunkwise(*x, group=1)  # noqa: E731
    program = equations(jax.make_jaxpr(lambda *x: with_gradients.__wrapped__(form, x))(*inputs))
    largest = max(np.prod(out.aval.shape) for each in program for out in each.outvars)
    assert 64 * 64 < largest <= 64 * 64 * 32 / 4


@pytest.mark.parametrize("form", [delta_rule_recurrence, chunkwise])
def test_float32_is_multiplied_at_highest_precision(form):
    inputs = [jnp.asarray(x, jnp.float32) for x in example(128)]
    assert precisions(jax.make_jaxpr(lambda *x: with_gradients.__wrapped__(form, x))(*inputs)) == {HIGHEST}


def test_a_chunk_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="chunk=48"):
        delta_rule_chunkwise(*(jnp.asarray(x, jnp.float32) for x in example(3)), chunk=48)
