"""The gated delta rule in chunks of tokens (Kimi Linear, section 3 and appendix), with a derivative written by hand.

Inside a chunk of C tokens the rule is a triangular system. Rows are tokens; with G the running sum of log decays since
the chunk's start, E_ij = exp(G_i - G_j) per channel, q already divided by sqrt(K), and S the state at the start,

    L_ij = beta_i sum_d k_id k_jd E_ijd  (i > j)      P_ij = sum_d q_id k_jd E_ijd  (i >= j)
    R    = V - (exp(G) * K) S                         what the state at the chunk's start gets wrong
    V'   = (I + L)^-1 (beta * R)                      what each token writes
    O    = (exp(G) * Q) S + P V'
    S   <- exp(G_C) * S + (exp(G_C - G) * K)^T V'

so only the last lines of a chunk wait for the chunk before it. W and U of the paper are not formed: with S at hand, V'
takes one matmul less.

Decays without overflow and without cancellation. exp(-G) overflows under an unbounded gate, and G_i - G_j of two long
sums loses the small decays behind a large one. So log decays are only ever added up over the tokens in between. A pair
i > j meets at one level of a binary tree: at block size s, i lies in the lower and j in the upper of two neighbouring
blocks, and E_ij = exp(sum of g from i's block's start to i) * exp(sum of g after j to the end of j's block), both <= 1:
a matrix product. The levels inside a tile of a few tokens are one batched product, masked by level; those above go pair
by pair of blocks. Any g from 0 to -inf is exact to rounding, and -inf at the first token of a document separates it
from the one before: no mask is needed.

(I + L)^-1 is merged from blocks, [[A, 0], [X, B]]^-1 = [[A', 0], [-B' X A', B']]: errors do not grow as they do in the
Neumann series, which fails altogether for equal keys.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnres_jax.layers.delta_rule import HIGHEST, reset_at_documents, start_state

TILE = 8  # tokens whose levels are one masked product a level: more than needed, in one go (4 and 16 cost the same)
GROUP_NUMBERS = 2**19  # [G, B, H, C, K]: 2 MiB, where a short row is one group and the loop over groups goes
FORGET = -1e4  # stands for -inf, which a product with zeros would turn into NaN; exp gives 0 for both


def delta_rule_chunkwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk: int = 64,
    group: int | None = None,
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
      chunk: tokens C of a chunk, a power of two from 2 on.
      group: chunks worked on at a time, all but the passing of states in parallel: memory grows with it. None: 8, or
        more as long as an array of a group has no more than `GROUP_NUMBERS`.

    Raises:
      ValueError: if `chunk` is not a power of two.
    """
    if chunk < 2 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} is no power of two from 2 on; the next is {max(2, _power_of_two(chunk))}")
    log_decay = reset_at_documents(log_decay, segment_ids)
    state, length = start_state(v, log_decay, initial_state), q.shape[1]
    size = min(chunk, max(2, _power_of_two(length)))
    if group is None:
        group = max(8, GROUP_NUMBERS // (size * math.prod(state.shape[:3])))
    groups = -(-length // (size * group))
    plan = Plan(size, -(-length // (size * groups)), groups)
    # A padded token keeps the state (g = 0) and writes nothing (beta = 0).
    pad = lambda x: jnp.pad(x, ((0, 0), (0, plan.tokens - length), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    read, state = _chunkwise(plan, *map(pad, (q, k, v, log_decay, beta)), state)
    return read[:, :length], state


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


class Plan(NamedTuple):
    """How a row is cut: `groups` times `group` chunks of `size` tokens."""

    size: int
    group: int
    groups: int

    @property
    def tokens(self) -> int:
        """Of the padded row."""
        return self.size * self.group * self.groups


class Inputs(NamedTuple):
    """A group of G chunks, chunk first since states pass from one to the next."""

    rows: Float[Array, "G B H C 2 K"]
    """Token by token beta * k and q / sqrt(K): the left sides of L and P, and what reads the state, in one array."""
    k: Float[Array, "G B H C K"]
    targets: Float[Array, "G B H C V"]
    """beta * v"""
    log_decay: Float[Array, "G B H C K"]
    own: Float[Array, "G B H C"]
    """The diagonal of P, on which nothing decays."""


class Decays(NamedTuple):
    """What is left of a channel between two tokens of a chunk, in factors <= 1."""

    tiles: Float[Array, "G B H tiles levels tile K"]
    """At each level inside a tile: from the start of a token's block if that is a lower one, else to its end."""
    pairs: list[tuple[Array, Array]]
    """At each level above, [G, B, H, pairs, s, K]: from the start of a lower block, to the end of an upper one."""
    from_start: Float[Array, "G B H C K"]
    """exp(G_i)"""
    to_end: Float[Array, "G B H C K"]
    """exp(G_C - G_i)"""

    @property
    def whole(self) -> Float[Array, "G B H K"]:
        """exp(G_C)"""
        return self.from_start[..., -1, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(plan, q, k, v, log_decay, beta, state):
    """`delta_rule_chunkwise` of a row of `plan.tokens`, and of the state's dtype."""
    return _forward(plan, (q, k, v, log_decay, beta), state, save=False)[0]


def _forward(plan, row, state, save):
    """(reads, final state); if to be saved, the states at the chunks' starts, V', (I + L)^-1 and P of every group."""
    precision = _precision(row)

    def one_group(state, x):
        decays = _decays(x.log_decay)
        inverse, scores = _within(x, decays)

        def pass_state(state, chunk):
            reading, k_out, targets, inverse, whole = chunk
            read = _by_kind(_matmul(reading, state, precision))
            new = _matmul(inverse, targets - read[..., 0, :], precision)
            after = whole[..., None] * state + _matmul(k_out.mT, new, precision)
            return after, (state, read[..., 1, :], new)

        chunks = (_reading(x, decays), decays.to_end * x.k, x.targets, inverse, decays.whole)
        state, (states, read, new) = jax.lax.scan(pass_state, state, chunks)
        return state, (read + _matmul(scores, new, precision), (states, new, inverse, scores) if save else None)

    state, (read, saved) = jax.lax.scan(one_group, state, _lay_out(plan, row, state.dtype))
    return (_row(read).astype(row[2].dtype), state), saved


def _chunkwise_forward(plan, q, k, v, log_decay, beta, state):
    row = (q, k, v, log_decay, beta)
    out, saved = _forward(plan, row, state, save=True)
    return out, (row, saved)


def _chunkwise_backward(plan, residuals, bars):
    """The derivative, group by group from the last (from the equations above; `x_bar` is the cotangent of x).

        V'_bar = P^T O_bar + K_out S_bar      e = (I + L)^-T V'_bar, the cotangent of beta * R
        L_bar  = -tril(e V'^T, -1)            P_bar = tril(O_bar V'^T)
        S_bar <- exp(G_C) * S_bar + Q_in^T O_bar - K_in^T e

    with Q_in = exp(G) * Q, K_in = beta * exp(G) * K, K_out = exp(G_C - G) * K. A log decay takes, from every factor
    exp(sum) that it is in, the factor times the factor's cotangent: nothing is divided by a decay that may be zero.
    """
    row, saved = residuals
    read_bar, state_bar = bars
    precision, dtype = _precision(row), state_bar.dtype

    def one_group(state_bar, inputs):
        x, o_bar, (states, new, inverse, scores) = inputs
        decays = _decays(x.log_decay)
        reading, k_out = _reading(x, decays), decays.to_end * x.k

        def pass_state(state_bar, chunk):
            reading, k_out, inverse, whole, new_bar, o_bar = chunk
            error_bar = _matmul(inverse.mT, new_bar + _matmul(k_out, state_bar, precision), precision)
            rows_bar = jnp.stack([-error_bar, o_bar], -2).reshape(*reading.shape[:-1], -1)  # of what the rows read
            before = whole[..., None] * state_bar + _matmul(reading.mT, rows_bar, precision)
            return before, (state_bar, rows_bar)

        chunks = (reading, k_out, inverse, decays.whole, _matmul(scores.mT, o_bar, precision), o_bar)
        before, (state_bars, read_bar) = jax.lax.scan(pass_state, state_bar, chunks, reverse=True)

        reading_bar = _matmul_nt(read_bar, states, precision)
        k_out_bar = _matmul_nt(new, state_bars, precision)
        products_bar = _matmul_nt(read_bar, new, HIGHEST)
        exponents_bar = (_both_kinds(reading * reading_bar), k_out * k_out_bar, decays.whole * _dot(states, state_bars))
        rows_bar, k_bar, log_decay_bar = _within_transpose(x, decays, products_bar, *exponents_bar)
        return before, Inputs(
            rows_bar + decays.from_start[..., None, :] * _by_kind(reading_bar),
            k_bar + decays.to_end * k_out_bar,
            -_by_kind(read_bar)[..., 0, :],
            log_decay_bar,
            jnp.diagonal(_by_kind(products_bar)[..., 1, :], axis1=-2, axis2=-1),
        )

    groups = (_lay_out(plan, row, dtype), _lay_out_one(plan, read_bar.astype(dtype)), saved)
    state_bar, bars = jax.lax.scan(one_group, state_bar, groups, reverse=True)
    return *_lay_out_transpose(row, bars), state_bar


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def _decays(log_decay: Float[Array, "*batch C K"]) -> Decays:
    """All factors, every exponent a sum of log decays of consecutive tokens."""
    size, chunk = min(TILE, log_decay.shape[-2]), log_decay.shape[-2]
    exponents = _exponents(_tiles(log_decay, size))
    prefix, suffix = (exponents[..., i, :, :].reshape(log_decay.shape) for i in (-2, -1))
    pairs = []
    while size < chunk:
        (before, prefix), (suffix, after) = _halves(prefix, size), _halves(suffix, size)
        pairs.append((jnp.exp(prefix), jnp.exp(suffix)))
        suffix = _interleave(suffix + prefix[..., -1:, :], after)
        prefix = _interleave(before, prefix + before[..., -1:, :])
        size *= 2
    return Decays(jnp.exp(exponents[..., :-2, :, :]), pairs, jnp.exp(prefix), jnp.exp(suffix))


def _reading(x: Inputs, decays: Decays) -> Float[Array, "G B H rows K"]:
    """exp(G) * beta * K and exp(G) * Q, row by row in turn: what reads the state at the chunk's start."""
    return _faded(x.rows, decays.from_start)


def _within(x: Inputs, decays: Decays) -> tuple[Float[Array, "G B H C C"], Float[Array, "G B H C C"]]:
    """(I + L)^-1 and P."""
    masks, size = _tile_masks(decays.tiles.shape[-2]), decays.tiles.shape[-2]
    left, right = _tile_operands(x, decays)
    products = _by_kind(_matmul_nt(left, right, HIGHEST))
    products = [mask[:, None] * products[..., level, :, :, :] for level, mask in enumerate(masks)]
    inverse, products = _unit_inverse([x[..., 0, :] for x in products]), sum(products)
    scores = products[..., 1, :] + _tiles(x.own[..., None], size) * jnp.eye(size, dtype=x.own.dtype)
    for left, right in _pair_operands(x, decays):
        products = _by_kind(_matmul_nt(left, right, HIGHEST))
        inverse = _merge_inverse(inverse[..., 0::2, :, :], products[..., 0, :], inverse[..., 1::2, :, :])
        scores = _merge(scores[..., 0::2, :, :], products[..., 1, :], scores[..., 1::2, :, :])
        size *= 2
    return inverse[..., 0, :, :], scores[..., 0, :, :]


def _within_transpose(x: Inputs, decays: Decays, products_bar, from_start_bar, to_end_bar, whole_bar):
    """Cotangents of rows, k and log decay from those of L and P (rows in turn) and of the chunk's own exponents.

    Of `products_bar` only what is below the diagonals is read.
    """
    sums, masks, tile = *_constants(decays), decays.tiles.shape[-2]
    blocks_bar = _by_kind(products_bar)[..., None, :, :, :]
    rows_bar, k_bar = 0, 0
    prefix_bar, suffix_bar, total_bar = from_start_bar, to_end_bar, whole_bar[..., None, None, :]
    for (left, right), (from_start, to_end) in zip(
        reversed(_pair_operands(x, decays)), reversed(decays.pairs), strict=True
    ):
        size = from_start.shape[-2]
        corner = blocks_bar[..., size:, :, :size].reshape(*left.shape[:-1], size)
        blocks_bar = jnp.stack([blocks_bar[..., :size, :, :size], blocks_bar[..., size:, :, size:]], -4)
        blocks_bar = blocks_bar.reshape(*x.k.shape[:-2], -1, size, 2, size)
        left_bar, right_bar = _matmul(corner, right, HIGHEST), _matmul(corner.mT, left, HIGHEST)
        # The sum over a block is part of the other block's exponents a level up.
        totals = (
            total_bar + jnp.sum(_halves(prefix_bar, size)[1], -2, keepdims=True),
            total_bar + jnp.sum(_halves(suffix_bar, size)[0], -2, keepdims=True),
        )
        total_bar = jnp.stack(totals, -3).reshape(*x.k.shape[:-2], -1, 1, x.k.shape[-1])
        prefix_bar += _interleave(None, _both_kinds(left * left_bar))
        suffix_bar += _interleave(right * right_bar, None)
        rows_bar += _by_kind(_interleave(None, _faded(_by_kind(left_bar), from_start)))
        k_bar += _interleave(right_bar * to_end, None)

    left, right = _tile_operands(x, decays)
    level_bar = jnp.stack([mask[:, None] * blocks_bar for mask in masks], -4).reshape(*left.shape[:-1], tile)
    left_bar, right_bar = _matmul(level_bar, right, HIGHEST), _matmul(level_bar.mT, left, HIGHEST)
    exponent_bar = _both_kinds(left * left_bar) + right * right_bar
    exponent_bar = exponent_bar.reshape(*exponent_bar.shape[:-3], -1, x.k.shape[-1])
    rows_bar += _sum_levels(_faded(_by_kind(left_bar), decays.tiles)).reshape(x.rows.shape)
    k_bar += _sum_levels(right_bar * decays.tiles).reshape(x.k.shape)
    log_decay_bar = _transposed(sums[:-2], exponent_bar) + total_bar
    log_decay_bar += _transposed(sums[-2], _tiles(prefix_bar, tile)) + _transposed(sums[-1], _tiles(suffix_bar, tile))
    return rows_bar, k_bar, log_decay_bar.reshape(x.k.shape)


def _tile_operands(x: Inputs, decays: Decays) -> tuple[Array, Array]:
    """The faded sides of the products inside tiles, at every level: rows [.., 2 tile, K] and keys [.., tile, K]."""
    size = decays.tiles.shape[-2]
    rows = x.rows.reshape(*x.k.shape[:-2], -1, 1, size, 2, x.k.shape[-1])
    return _faded(rows, decays.tiles), _tiles(x.k, size)[..., None, :, :] * decays.tiles


def _pair_operands(x: Inputs, decays: Decays) -> list[tuple[Array, Array]]:
    """At each level above the tiles, the faded lower blocks [.., pairs, 2 s, K] and upper ones [.., pairs, s, K]."""
    operands, rows = [], x.rows.reshape(*x.k.shape[:-2], -1, x.k.shape[-1])
    for from_start, to_end in decays.pairs:
        size = from_start.shape[-2]
        below, above = _by_kind(_halves(rows, 2 * size)[1]), _halves(x.k, size)[0]
        operands.append((_faded(below, from_start), above * to_end))
    return operands


def _faded(rows: Float[Array, "*fewer n 2 K"], factor: Float[Array, "*batch n K"]) -> Float[Array, "*batch rows K"]:
    """Both rows of a token, faded alike."""
    faded = rows * factor[..., None, :]
    return faded.reshape(*faded.shape[:-3], -1, faded.shape[-1])


def _by_kind(x: Float[Array, "*batch rows n"]) -> Float[Array, "*batch tokens 2 n"]:
    """Rows in turn by token and kind."""
    return x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])


def _both_kinds(x: Float[Array, "*batch rows n"]) -> Float[Array, "*batch tokens n"]:
    """The sum over the two rows of each token."""
    x = _by_kind(x)
    return x[..., 0, :] + x[..., 1, :]


def _sum_levels(x: Float[Array, "*batch levels tile K"]) -> Float[Array, "*batch tile K"]:
    return sum(x[..., level, :, :] for level in range(x.shape[-3]))


def _transposed(sums: np.ndarray, bar: Array) -> Array:
    """Back from sums to the log decays of the tokens in them."""
    return _matmul(_everywhere(sums.reshape(-1, sums.shape[-1]).T, bar), bar, HIGHEST)


def _exponents(log_decay: Float[Array, "*batch tile K"]) -> Float[Array, "*batch exponents tile K"]:
    """The exponents of a tile's levels, then of the sums from its start and to its end."""
    sums = _tile_sums(log_decay.shape[-2])
    flat = _matmul(_everywhere(sums.reshape(-1, sums.shape[-1]), log_decay), log_decay, HIGHEST)
    return flat.reshape(*log_decay.shape[:-2], *sums.shape[:-1], log_decay.shape[-1])


def _constants(decays: Decays) -> tuple[np.ndarray, np.ndarray]:
    """Sums and masks of the decays' tiles."""
    size = decays.tiles.shape[-2]
    return _tile_sums(size), _tile_masks(size)


@functools.cache
def _tile_sums(size: int) -> np.ndarray:
    """The tokens in a sum, 0 or 1 [exponents, tile, tile]: at each level, from the tile's start, to the tile's end."""
    row, token = np.indices((size, size))
    exponents = []
    for block in (1 << level for level in range(size.bit_length() - 1)):
        from_start = (token <= row) & (token >= row // block * block)
        to_end = (token > row) & (token < (row // block + 1) * block)
        exponents.append(np.where(row // block % 2 == 1, from_start, to_end))
    return np.stack([*exponents, token <= row, token > row]).astype(np.float32)


@functools.cache
def _tile_masks(size: int) -> np.ndarray:
    """Which pairs of tokens meet at a level, 0 or 1 [levels, tile, tile]."""
    row, token = np.indices((size, size))
    blocks = (1 << level for level in range(size.bit_length() - 1))
    return np.stack([(row // b % 2 == 1) & (token // b == row // b - 1) for b in blocks]).astype(np.float32)


def _everywhere(constant: np.ndarray, like: Array) -> Array:
    """A constant matrix for every batch index: as a batched product it gives the layout that the next one reads."""
    return jnp.broadcast_to(jnp.asarray(constant, like.dtype), (*like.shape[:-2], *constant.shape))


def _unit_inverse(by_level: Sequence[Float[Array, "*batch n n"]]) -> Float[Array, "*batch n n"]:
    """(I + L)^-1 of a strictly lower triangle, given by what of it pairs the blocks of each level, zero elsewhere.

    With D the inverse of the blocks on the diagonal, D - D X D merges all pairs at once: of matrices this small one
    whole product costs less than slices, products of parts and their concatenation.
    """
    inverse = jnp.eye(by_level[0].shape[-1], dtype=by_level[0].dtype) - by_level[0]
    for pairs in by_level[1:]:
        inverse -= _matmul(inverse, _matmul(pairs, inverse, HIGHEST), HIGHEST)
    return inverse


def _merge_inverse(above, corner, below):
    """The inverse of [[A, 0], [X, B]] from those of A and B."""
    return _merge(above, -_matmul(below, _matmul(corner, above, HIGHEST), HIGHEST), below)


def _merge(above, corner, below):
    """[[above, 0], [corner, below]]"""
    top = jnp.concatenate([above, jnp.zeros_like(above)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, below], -1)], -2)


def _tiles(x: Float[Array, "*batch C K"], size: int) -> Float[Array, "*batch tiles tile K"]:
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _halves(x: Float[Array, "*batch C K"], size: int) -> tuple[Array, Array]:
    """Upper and lower blocks of all pairs, [*batch, pairs, size, K] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _interleave(upper: Array | None, lower: Array | None) -> Array:
    """The reverse of `_halves`; None stands for zeros."""
    upper, lower = (jnp.zeros_like(y) if x is None else x for x, y in ((upper, lower), (lower, upper)))
    x = jnp.stack([upper, lower], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _matmul(a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    return jnp.matmul(a, b, precision=precision)


def _matmul_nt(a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    """a b^T, contracted in place: of `b.mT` XLA on CPU makes a copy where b is computed."""
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=precision)


def _dot(a: Float[Array, "*batch K"], b: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Inner products, as a matrix product with ones: XLA on CPU (jax 0.10.2) reduces a last axis ten times slower, and
    programs of many such sums of products fused into one kernel have crashed."""
    return _matmul(a * b, jnp.ones((a.shape[-1], 1), a.dtype), HIGHEST)[..., 0]


def _precision(row: tuple[Array, ...]) -> jax.lax.Precision | None:
    """Of the products with states and values: half-precision values are not worth more than the fastest."""
    return HIGHEST if row[2].dtype.itemsize >= 4 else None


def _lay_out(plan: Plan, row: tuple[Array, ...], dtype) -> Inputs:
    """The row by groups, chunks and heads, once for all: XLA would put it into everything that reads a group."""
    q, k, v, log_decay, beta = (x.astype(dtype) for x in row)
    q = q / math.sqrt(q.shape[-1])
    laid = (beta[..., None] * v, jnp.maximum(log_decay, FORGET), _dot(q, k))
    rows = _lay_out_one(plan, jnp.stack([beta[..., None] * k, q], -2))
    return Inputs(rows, *(_lay_out_one(plan, x) for x in (k, *laid)))


def _lay_out_transpose(row: tuple[Array, ...], bars: Inputs) -> tuple[Array, ...]:
    """Cotangents of the row's arrays from those of `_lay_out`."""
    q, k, v, _, beta = (x.astype(bars.k.dtype) for x in row)
    rows, k_bar, targets, log_decay, own = (_row(bar) for bar in bars)
    beta_bar = _dot(rows[..., 0, :], k) + _dot(targets, v)
    q_bar = (rows[..., 1, :] + own[..., None] * k) / math.sqrt(q.shape[-1])
    k_bar += beta[..., None] * rows[..., 0, :] + own[..., None] * q / math.sqrt(q.shape[-1])
    out = (q_bar, k_bar, beta[..., None] * targets, log_decay, beta_bar)
    return tuple(bar.astype(x.dtype) for bar, x in zip(out, row, strict=True))


def _lay_out_one(plan: Plan, x: Array) -> Array:
    """[B, T, H, ...] to [groups, G, B, H, C, ...]"""
    x = x.reshape(len(x), plan.groups, plan.group, plan.size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2, 0, 4, 3), (0, 1, 2, 3, 4))


def _row(x: Array) -> Array:
    """The reverse of `_lay_out_one`."""
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 2, 0, 4, 3))
    return x.reshape(len(x), -1, *x.shape[4:])
