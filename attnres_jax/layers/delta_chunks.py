"""The gated delta rule in chunks of tokens (Kimi Linear, section 3 and appendix), with a derivative written by hand.

Inside a chunk of C tokens the rule is a triangular system. Rows are tokens; with G the running sum of log decays since
the chunk's start, E_ij = exp(G_i - G_j) per channel, q already divided by sqrt(K), and S the state at the start,

    L_ij = beta_i sum_d k_id k_jd E_ijd  (i > j)      P_ij = sum_d q_id k_jd E_ijd  (i >= j)
    R    = V - (exp(G) * K) S                         what the state at the chunk's start gets wrong
    V'   = (I + L)^-1 (beta * R)                      what each token writes
    O    = (exp(G) * Q) S + P V'
    S   <- exp(G_C) * S + (exp(G_C - G) * K)^T V'

so only the last lines of a chunk wait for the chunk before it. (I + L)^-1 is merged from blocks, [[A, 0], [X, B]]^-1 =
[[A', 0], [-B' X A', B']]: errors do not grow as they do in the Neumann series, which fails altogether for equal keys.

exp(-G) overflows under an unbounded gate. So there are two forms, and a call takes, while it runs, the one that its
decays allow: `delta_tiles`, which takes the decays of 16 tokens from their middle, where no channel fades by more than
exp(-41) in 8 tokens; and `delta_levels`, at two thirds of the speed, for any. Under a bounded gate as Kimi K3's the
first alone is compiled.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnres_jax.axes import platform
from attnres_jax.layers import delta_levels, delta_tiles
from attnres_jax.layers.delta_algebra import Plan, groups_of, row_of
from attnres_jax.layers.delta_rule import HIGHEST, at_starts, document_starts, start_state

GROUP = 4  # chunks, where there is no reason for fewer
CPU_GROUP_BYTES = 1 << 16  # up to it a core keeps a group in its cache, and XLA an operation on that core


def delta_rule_chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk: int | None = None,
    group: int | None = None,
    lower_bound: float | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule over a row of any length: what every token reads, in the dtype of `v`, and the final state.

    For its backward pass it keeps the inputs and, a chunk and head, the state [K, V], V' [C, V] and two arrays [C, C].

    Args:
      q: queries; the scale 1 / sqrt(K) is applied here.
      k: keys, of length 1 or less for a stable rule.
      v: values.
      log_decay: log of what each key channel of the state keeps at a token, <= 0, -inf to forget.
      beta: how far the state's answer to a key is moved towards the value, in [0, 1].
      initial_state: the state before the first token, which belongs to the row's first document. None: zeros.
      segment_ids: documents, as runs of equal ids; each but the first starts from zeros. None: one document a row.
      chunk: tokens C of a chunk, a power of two from 2 on. None: half the width of keys, from 16 to 64.
      group: chunks worked on at a time, all but the passing of states in parallel: memory grows with it. None: 4, and
        on CPU what keeps an array of theirs within 64 KiB, or 1.
      lower_bound: what no log decay is below, where that is known: from -41 / 8 on one form is all that is compiled.

    Raises:
      ValueError: if `chunk` is not a power of two.
    """
    if chunk is None:
        chunk = max(16, min(64, _power_of_two(k.shape[-1]) // 2))  # it costs as much inside chunks as between them
    if chunk < 2 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} is no power of two from 2 on; the next is {max(2, _power_of_two(chunk))}")
    state, length = start_state(v, log_decay, initial_state), q.shape[1]
    size = min(chunk, max(2, _power_of_two(length)))
    if group is None:
        chunk_bytes = 4 * size * math.prod((len(k), *k.shape[2:]))
        group = GROUP if platform() != "cpu" else min(GROUP, max(1, CPU_GROUP_BYTES // chunk_bytes))
    groups = -(-length // (size * group))
    plan = Plan(size, -(-length // (size * groups)), groups, () if len(q) == 1 else (len(q),))
    # A padded token keeps the state (g = 0) and writes nothing (beta = 0).
    pad = lambda x: jnp.pad(x, ((0, 0), (0, plan.tokens - length), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    starts = None if segment_ids is None else pad(document_starts(segment_ids))
    always_mild = lower_bound is not None and delta_tiles.allows(plan, lower_bound)
    first = state.reshape(*plan.rows, *state.shape[1:])
    read, last = _chunkwise(plan, always_mild, *map(pad, (q, k, v, log_decay, beta)), starts, first)
    return read[:, :length], last.reshape(state.shape)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(plan, always_mild, q, k, v, log_decay, beta, starts, state):
    """`delta_rule_chunkwise` of a row of `plan.tokens`, documents beginning at `starts` [B, T] if not None; states are
    [*rows, H, K, V]."""
    return _forward(plan, always_mild, (q, k, v, log_decay, beta), starts, state, save=False)[0]


def _forward(plan, always_mild, row, starts, state, save):
    """By whichever form the decays allow, which it saves too: the backward pass must not come to another verdict."""

    def by(form, at_start):
        groups = _groups_of(plan, row, starts, at_start)
        (read, last), saved = form.forward(plan, groups, state, _state_precision(row), save)
        return (row_of(plan, read).astype(row[2].dtype), last), saved

    is_mild = None if always_mild else delta_tiles.is_mild(plan, at_starts(starts, row[3], 0.0), state.dtype)
    out, saved = _either(is_mild, by)
    return out, (is_mild, saved)


def _chunkwise_forward(plan, always_mild, q, k, v, log_decay, beta, starts, state):
    row = (q, k, v, log_decay, beta)
    out, saved = _forward(plan, always_mild, row, starts, state, save=True)
    return out, (row, starts, *saved)


def _chunkwise_backward(plan, always_mild, residuals, bars):
    row, starts, is_mild, saved = residuals
    read_bar, state_bar = bars

    def by(form, at_start):
        groups, read_groups = _groups_of(plan, row, starts, at_start), groups_of(plan, read_bar)
        bars, first_bar = form.backward(plan, groups, saved, read_groups, state_bar, _state_precision(row))
        q_bar, k_bar, v_bar, log_decay_bar, beta_bar = (row_of(plan, bar) for bar in bars)
        log_decay_bar = at_starts(starts, log_decay_bar, 0.0)
        return q_bar, k_bar, v_bar, log_decay_bar, beta_bar, None, first_bar

    return _either(is_mild, by)


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def _either(is_mild, by):
    """By what the verdict says, and what it takes a document's first token to keep: all, for masks separate it, or
    nothing; without a verdict in tiles, and the other form is not in the program."""
    in_tiles, by_level = (lambda: by(delta_tiles, 0.0)), (lambda: by(delta_levels, -jnp.inf))
    return in_tiles() if is_mild is None else jax.lax.cond(is_mild, in_tiles, by_level)


def _groups_of(plan, row, starts, at_start) -> tuple[Array | None, ...]:
    q, k, v, log_decay, beta = row
    row = (q, k, v, at_starts(starts, log_decay, at_start), beta, starts)
    return jax.tree.map(functools.partial(groups_of, plan), row)


def _state_precision(row) -> jax.lax.Precision | None:
    """Of the products with states and values: half-precision values are not worth more than the fastest."""
    return HIGHEST if row[2].dtype.itemsize >= 4 else None
