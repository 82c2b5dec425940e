"""The delta rule in chunks, exact for any decays: log decays are only ever added up over the tokens in between.

Notation of `delta_chunks`. exp(-G) overflows under an unbounded gate, and G_i - G_j of two long sums loses the small
decays behind a large one. Here a pair i > j meets at one level of a binary tree: at block size s, i lies in the lower
and j in the upper of two neighbouring blocks, and E_ij = exp(sum of g from i's block's start to i) * exp(sum of g after
j to the end of j's block), both <= 1: a matrix product. The levels inside a tile of a few tokens are one batched
product, masked by level; those above go pair by pair of blocks. Any g from 0 to -inf is exact to rounding, and -inf at
the first token of a document separates it from the one before: no mask is needed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax.layers.delta_algebra import (
    TILE,
    UNROLLED,
    Chunks,
    Plan,
    chunks_of,
    chunks_of_transpose,
    dot,
    everywhere,
    lay_back,
    lay_out,
    level_masks,
    matmul,
    matmul_nt,
    merge,
    merge_inverse,
    tile_inverse,
    tiles,
)
from attnres_jax.layers.delta_rule import HIGHEST

FORGET = -1e4  # stands for -inf, which a product with zeros would turn into NaN; exp gives 0 for both


class Inputs(NamedTuple):
    """What this form uses of `Chunks`."""

    rows: Float[Array, "G *rows H C 2 K"]
    """Token by token beta * k and q / sqrt(K): the left sides of L and P, and what reads the state, in one array."""
    k: Float[Array, "G *rows H C K"]
    targets: Float[Array, "G *rows H C V"]
    """beta * v"""
    log_decay: Float[Array, "G *rows H C K"]
    own: Float[Array, "G *rows H C"]
    """The diagonal of P, on which nothing decays."""


class Decays(NamedTuple):
    """What is left of a channel between two tokens of a chunk, in factors <= 1."""

    tiles: Float[Array, "G *rows H tiles levels tile K"]
    """At each level inside a tile: from the start of a token's block if that is a lower one, else to its end."""
    pairs: list[tuple[Array, Array]]
    """At each level above, [G, *rows, H, pairs, s, K]: from the start of a lower block, to the end of an upper one."""
    from_start: Float[Array, "G *rows H C K"]
    """exp(G_i)"""
    to_end: Float[Array, "G *rows H C K"]
    """exp(G_C - G_i)"""

    @property
    def whole(self) -> Float[Array, "G *rows H K"]:
        """exp(G_C)"""
        return self.from_start[..., -1, :]


def forward(plan: Plan, row, state, precision, save):
    """(reads, final state); if to be saved, the states at the chunks' starts, V', (I + L)^-1 and P of every group."""

    def one_group(state, group):
        x = _inputs(chunks_of(plan, group, state.dtype))
        decays = _decays(x.log_decay)
        inverse, scores = _within(x, decays)

        def pass_state(state, chunk):
            reading, k_out, targets, inverse, whole = chunk
            read = _by_kind(matmul(reading, state, precision))
            new = matmul(inverse, targets - read[..., 0, :], precision)
            after = whole[..., None] * state + matmul(k_out.mT, new, precision)
            return after, (state, read[..., 1, :], new)

        operands = (_reading(x, decays), decays.to_end * x.k, x.targets, inverse, decays.whole)
        state, (states, read, new) = jax.lax.scan(pass_state, state, operands, unroll=UNROLLED)
        read = lay_back(plan, read + matmul(scores, new, precision))
        return state, (read, (states, new, inverse, scores) if save else None)

    state, (read, saved) = jax.lax.scan(one_group, state, row)
    return (read, state), saved


def backward(plan: Plan, row, saved, read_bar, state_bar, precision):
    """The derivative, group by group from the last (from the equations above; `x_bar` is the cotangent of x).

        V'_bar = P^T O_bar + K_out S_bar      e = (I + L)^-T V'_bar, the cotangent of beta * R
        L_bar  = -tril(e V'^T, -1)            P_bar = tril(O_bar V'^T)
        S_bar <- exp(G_C) * S_bar + Q_in^T O_bar - K_in^T e

    with Q_in = exp(G) * Q, K_in = beta * exp(G) * K, K_out = exp(G_C - G) * K. A log decay takes, from every factor
    exp(sum) that it is in, the factor times the factor's cotangent: nothing is divided by a decay that may be zero.
    """

    def one_group(state_bar, inputs):
        group, o_bar, (states, new, inverse, scores) = inputs
        chunks, o_bar = chunks_of(plan, group, state_bar.dtype), lay_out(plan, o_bar.astype(state_bar.dtype))
        x = _inputs(chunks)
        decays = _decays(x.log_decay)
        reading, k_out = _reading(x, decays), decays.to_end * x.k

        def pass_state(state_bar, chunk):
            reading, k_out, inverse, whole, new_bar, o_bar = chunk
            error_bar = matmul(inverse.mT, new_bar + matmul(k_out, state_bar, precision), precision)
            rows_bar = jnp.stack([-error_bar, o_bar], -2).reshape(*reading.shape[:-1], -1)  # of what the rows read
            before = whole[..., None] * state_bar + matmul(reading.mT, rows_bar, precision)
            return before, (state_bar, rows_bar)

        operands = (reading, k_out, inverse, decays.whole, matmul(scores.mT, o_bar, precision), o_bar)
        before, (state_bars, read_bar) = jax.lax.scan(pass_state, state_bar, operands, reverse=True, unroll=UNROLLED)

        reading_bar = matmul_nt(read_bar, states, precision)
        k_out_bar = matmul_nt(new, state_bars, precision)
        products_bar = matmul_nt(read_bar, new, HIGHEST)
        exponents_bar = (_both_kinds(reading * reading_bar), k_out * k_out_bar, decays.whole * dot(states, state_bars))
        rows_bar, k_bar, log_decay_bar = _within_transpose(x, decays, products_bar, *exponents_bar)
        bars = Inputs(
            rows_bar + decays.from_start[..., None, :] * _by_kind(reading_bar),
            k_bar + decays.to_end * k_out_bar,
            -_by_kind(read_bar)[..., 0, :],
            log_decay_bar,
            jnp.diagonal(_by_kind(products_bar)[..., 1, :], axis1=-2, axis2=-1),
        )
        return before, chunks_of_transpose(plan, group, _inputs_transpose(chunks, bars))

    state_bar, bars = jax.lax.scan(one_group, state_bar, (row, read_bar, saved), reverse=True)
    return bars, state_bar


def _decays(log_decay: Float[Array, "*batch C K"]) -> Decays:
    """All factors, every exponent a sum of log decays of consecutive tokens."""
    size, chunk = min(TILE, log_decay.shape[-2]), log_decay.shape[-2]
    exponents = _exponents(tiles(log_decay, size))
    prefix, suffix = (exponents[..., i, :, :].reshape(log_decay.shape) for i in (-2, -1))
    pairs = []
    while size < chunk:
        (before, prefix), (suffix, after) = _halves(prefix, size), _halves(suffix, size)
        pairs.append((jnp.exp(prefix), jnp.exp(suffix)))
        suffix = _interleave(suffix + prefix[..., -1:, :], after)
        prefix = _interleave(before, prefix + before[..., -1:, :])
        size *= 2
    return Decays(jnp.exp(exponents[..., :-2, :, :]), pairs, jnp.exp(prefix), jnp.exp(suffix))


def _reading(x: Inputs, decays: Decays) -> Float[Array, "G *rows H rows K"]:
    """exp(G) * beta * K and exp(G) * Q, row by row in turn: what reads the state at the chunk's start."""
    return _faded(x.rows, decays.from_start)


def _within(x: Inputs, decays: Decays) -> tuple[Float[Array, "G *rows H C C"], Float[Array, "G *rows H C C"]]:
    """(I + L)^-1 and P."""
    masks, size = level_masks(decays.tiles.shape[-2]), decays.tiles.shape[-2]
    left, right = _tile_operands(x, decays)
    products = _by_kind(matmul_nt(left, right, HIGHEST))
    products = [mask[:, None] * products[..., level, :, :, :] for level, mask in enumerate(masks)]
    inverse, products = tile_inverse([x[..., 0, :] for x in products]), sum(products)
    scores = products[..., 1, :] + tiles(x.own[..., None], size) * jnp.eye(size, dtype=x.own.dtype)
    for left, right in _pair_operands(x, decays):
        products = _by_kind(matmul_nt(left, right, HIGHEST))
        inverse = merge_inverse(inverse[..., 0::2, :, :], products[..., 0, :], inverse[..., 1::2, :, :])
        scores = merge(scores[..., 0::2, :, :], products[..., 1, :], scores[..., 1::2, :, :])
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
        left_bar, right_bar = matmul(corner, right, HIGHEST), matmul(corner.mT, left, HIGHEST)
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
    left_bar, right_bar = matmul(level_bar, right, HIGHEST), matmul(level_bar.mT, left, HIGHEST)
    exponent_bar = _both_kinds(left * left_bar) + right * right_bar
    exponent_bar = exponent_bar.reshape(*exponent_bar.shape[:-3], -1, x.k.shape[-1])
    rows_bar += _sum_levels(_faded(_by_kind(left_bar), decays.tiles)).reshape(x.rows.shape)
    k_bar += _sum_levels(right_bar * decays.tiles).reshape(x.k.shape)
    log_decay_bar = _transposed(sums[:-2], exponent_bar) + total_bar
    log_decay_bar += _transposed(sums[-2], tiles(prefix_bar, tile)) + _transposed(sums[-1], tiles(suffix_bar, tile))
    return rows_bar, k_bar, log_decay_bar.reshape(x.k.shape)


def _tile_operands(x: Inputs, decays: Decays) -> tuple[Array, Array]:
    """The faded sides of the products inside tiles, at every level: rows [.., 2 tile, K] and keys [.., tile, K]."""
    size = decays.tiles.shape[-2]
    rows = x.rows.reshape(*x.k.shape[:-2], -1, 1, size, 2, x.k.shape[-1])
    return _faded(rows, decays.tiles), tiles(x.k, size)[..., None, :, :] * decays.tiles


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
    return matmul(everywhere(sums.reshape(-1, sums.shape[-1]).T, bar), bar, HIGHEST)


def _exponents(log_decay: Float[Array, "*batch tile K"]) -> Float[Array, "*batch exponents tile K"]:
    """The exponents of a tile's levels, then of the sums from its start and to its end."""
    sums = _tile_sums(log_decay.shape[-2])
    flat = matmul(everywhere(sums.reshape(-1, sums.shape[-1]), log_decay), log_decay, HIGHEST)
    return flat.reshape(*log_decay.shape[:-2], *sums.shape[:-1], log_decay.shape[-1])


def _constants(decays: Decays) -> tuple[np.ndarray, np.ndarray]:
    """Sums and masks of the decays' tiles."""
    size = decays.tiles.shape[-2]
    return _tile_sums(size), level_masks(size)


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


def _halves(x: Float[Array, "*batch C K"], size: int) -> tuple[Array, Array]:
    """Upper and lower blocks of all pairs, [*batch, pairs, size, K] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _interleave(upper: Array | None, lower: Array | None) -> Array:
    """The reverse of `_halves`; None stands for zeros."""
    upper, lower = (jnp.zeros_like(y) if x is None else x for x, y in ((upper, lower), (lower, upper)))
    x = jnp.stack([upper, lower], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _inputs(x: Chunks) -> Inputs:
    rows = jnp.stack([x.beta * x.k, x.q], -2)
    return Inputs(rows, x.k, x.beta * x.v, jnp.maximum(x.log_decay, FORGET), dot(x.q, x.k))


def _inputs_transpose(x: Chunks, bars: Inputs) -> Chunks:
    """Cotangents of the chunks from those of `_inputs`."""
    k_bar, q_bar = bars.rows[..., 0, :], bars.rows[..., 1, :]  # of beta * k and q where they are rows
    own = bars.own[..., None]
    return Chunks(
        q_bar + own * x.k,
        bars.k + x.beta * k_bar + own * x.q,
        x.beta * bars.targets,
        bars.log_decay,
        (dot(k_bar, x.k) + dot(bars.targets, x.v))[..., None],
        None,
    )
