"""The delta rule in chunks of mild decays: those of a tile of 16 tokens are all taken from the tile's middle.

Notation of `delta_chunks`, with m_a = G of the last token of the first half of tile a. Token i of tile a and token j of
tile b <= a meet with E_ij = exp(G_i - m_a) * exp(m_a - m_b) * exp(m_b - G_j). So, of

    K_in = beta * exp(G - m) * K      Q_in = exp(G - m) * Q      K_out = exp(m - G) * K

the rows of L and P in tile a are products of K_in and Q_in there with K_out, that of earlier tiles faded on to m_a.

The exponents of these three are sums over at most half a tile, of either sign; up to `REACH` no factor and no product
of two overflows, what is small keeps its digits, and rounding an exponent is an error of 41 * 2^-24 at worst. Every
other factor is 1 at most, whatever the decays. A gate bounded by -5 a token, as Kimi K3's, stays below.

A chunk may hold parts of several documents: pairs of different ones are masked, as is what a token of any but the first
reads of S, and what a token of any but the last leaves in it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnres_jax.layers import delta_algebra
from attnres_jax.layers.delta_algebra import (
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
    matmul_tn,
    merge_inverse,
    tile_inverse,
    tiles,
)
from attnres_jax.layers.delta_rule import HIGHEST

TILE = 16
REACH = 41.0  # exponents up to it: in float32 exp(41) times itself and a long sum of such stay finite


class Faded(NamedTuple):
    """What the products are of."""

    k_in: Float[Array, "G *rows H C K"]
    q_in: Float[Array, "G *rows H C K"]
    k_out: Float[Array, "G *rows H C K"]
    from_middle: Float[Array, "G *rows H C K"]
    """exp(G_i - m)"""
    to_token: Float[Array, "G *rows H C K"]
    """exp(m - G_i)"""
    between: Float[Array, "G *rows H tiles K"]
    """exp(m_a - m_(a-1)), of the first tile exp(m_0)"""
    before: Float[Array, "G *rows H C K"]
    """exp(m), of a token's tile."""
    after: Float[Array, "G *rows H C K"]
    """exp(G_C - m)"""
    whole: Float[Array, "G *rows H K 1"]
    """exp(G_C)"""


class Documents(NamedTuple):
    """Who has to do with whom, as factors 0 and 1 but for `same`; where no document begins, plain numbers."""

    same: Bool[Array, "G *rows 1 C C"] | bool
    first: Float[Array, "G *rows 1 C 1"] | float
    """Tokens of the document that the chunk begins with."""
    last: Float[Array, "G *rows 1 C 1"] | float
    """Tokens of the one that it ends with."""
    whole: Float[Array, "G *rows 1 1 1"] | float
    """Whether it is one document's."""


def is_mild(plan: Plan, log_decay: Float[Array, "B T H K"], dtype) -> Bool[Array, ""]:
    """Whether no channel fades by more than exp(-REACH) in half a tile."""
    half = _tile(plan.size) // 2
    sums = jnp.sum(log_decay.astype(dtype).reshape(len(log_decay), -1, half, *log_decay.shape[2:]), 2)
    return jnp.min(sums) >= -REACH


def allows(plan: Plan, lower_bound: float) -> bool:
    """Whether log decays that are not below the bound are mild, whatever they are."""
    return lower_bound * (_tile(plan.size) // 2) >= -REACH


def forward(plan: Plan, row, state, precision, save):
    """(reads, final state); if to be saved, S of every chunk, V', (I + L)^-T and P^T of every group."""

    def one_group(state, group):
        x = chunks_of(plan, group, state.dtype)
        faded, documents = _faded(x), _documents(x)
        strictly, lower = _masks(x, documents)
        right_sides = _right_sides(faded)
        products = _products(_rows(faded.k_in, faded.q_in), right_sides)
        inverse, scores = _inverse(_where(strictly, products[0])), _where(lower, products[1])
        reading, writing = documents.first * faded.before, documents.last * faded.after

        def pass_state(state, chunk):
            k_read, q_read, k_write, targets, inverse, whole = chunk
            new = matmul(inverse, targets - matmul(k_read, state, precision), precision)
            after = whole * state + matmul_tn(k_write, new, precision)
            return after, (state, new, matmul(q_read, state, precision))

        chunks = (
            reading * faded.k_in,
            reading * faded.q_in,
            writing * faded.k_out,
            x.beta * x.v,
            inverse,
            documents.whole * faded.whole,
        )
        state, (states, new, read) = jax.lax.scan(pass_state, state, chunks, unroll=UNROLLED)
        read = lay_back(plan, read + matmul(scores, new, precision))
        return state, (read, (states, new, inverse.mT, scores.mT) if save else None)

    state, (read, saved) = jax.lax.scan(one_group, state, row)
    return (read, state), saved


def backward(plan: Plan, row, saved, read_bar, state_bar, precision):
    """The derivative, group by group from the last (`x_bar` is the cotangent of x).

        V'_bar = P^T O_bar + (exp(G_C - G) * K) S_bar    e = (I + L)^-T V'_bar, the cotangent of beta * R
        L_bar  = -tril(e V'^T, -1)                       P_bar = tril(O_bar V'^T)
        K_in_bar  = L_bar K_out - exp(m) * e S^T         Q_in_bar = P_bar K_out + exp(m) * O_bar S^T
        K_out_bar = L_bar^T K_in + P_bar^T Q_in + exp(G_C - m) * V' S_bar^T
        S_bar <- exp(G_C) * S_bar + (exp(G) * Q)^T O_bar - (exp(G) * beta * K)^T e

    with the factors between tiles left out. G_i takes K_in * K_in_bar + Q_in * Q_in_bar - K_out * K_out_bar: whatever a
    middle takes cancels. G_C takes exp(G_C) * S * S_bar summed over values, and what is written, K_out times the last
    term of K_out_bar, summed over tokens.

    Where all that a decay takes is small, nothing large may cancel in it: P_ii has no decay and is not in these sums;
    and of what is written, G_C's less that of a token and all later ones, it takes that of the earlier ones.
    """

    def one_group(state_bar, inputs):
        group, o_bar, (states, new, inverse_t, scores_t) = inputs
        x, o_bar = chunks_of(plan, group, state_bar.dtype), lay_out(plan, o_bar.astype(state_bar.dtype))
        faded, documents = _faded(x), _documents(x)
        strictly, _ = _masks(x, documents)
        reading, writing = documents.first * faded.before, documents.last * faded.after
        whole = documents.whole * faded.whole

        def pass_state(state_bar, chunk):
            k_read, k_write, inverse_t, whole, new_bar, reading_bar = chunk
            targets_bar = matmul(inverse_t, new_bar + matmul(k_write, state_bar, precision), precision)
            before = whole * state_bar + reading_bar - matmul_tn(k_read, targets_bar, precision)
            return before, (state_bar, targets_bar)

        chunks = (
            reading * faded.k_in,
            writing * faded.k_out,
            inverse_t,
            whole,
            matmul(scores_t, o_bar, precision),
            matmul_tn(reading * faded.q_in, o_bar, precision),
        )
        state_bar, (state_bars, targets_bar) = jax.lax.scan(
            pass_state, state_bar, chunks, reverse=True, unroll=UNROLLED
        )

        products_bar = _where(strictly, -matmul_nt(targets_bar, new, HIGHEST))
        scores_bar, own_bar = _where(strictly, matmul_nt(o_bar, new, HIGHEST)), dot(o_bar, new)[..., None]
        left, both_bar = _rows(faded.k_in, faded.q_in), _rows(products_bar, scores_bar)
        k_in_bar, q_in_bar = _left_bar(both_bar, _right_sides(faded))
        k_in_bar -= reading * matmul_nt(targets_bar, states, precision)
        q_in_bar += reading * matmul_nt(o_bar, states, precision)
        written_bar = writing * matmul_nt(new, state_bars, precision)
        k_out_bar = _right_bar(both_bar, left, faded.between)

        sums_bar = faded.k_in * k_in_bar + faded.q_in * q_in_bar - faded.k_out * k_out_bar
        whole_bar = (whole[..., 0] * dot(states, state_bars))[..., None, :]
        rows_bar = faded.from_middle * k_in_bar  # of beta * k
        bars = Chunks(
            faded.from_middle * q_in_bar + own_bar * x.k,
            faded.to_token * (k_out_bar + written_bar) + x.beta * rows_bar + own_bar * x.q,
            x.beta * targets_bar,
            _sums(sums_bar, faded.k_out * written_bar, documents) + whole_bar,
            (dot(rows_bar, x.k) + dot(targets_bar, x.v))[..., None],
            None,
        )
        return state_bar, chunks_of_transpose(plan, group, bars)

    state_bar, bars = jax.lax.scan(one_group, state_bar, (row, read_bar, saved), reverse=True)
    return bars, state_bar


def _tile(size: int) -> int:
    """Tokens of a tile in chunks of `size`."""
    return min(TILE, size)


def _faded(x: Chunks) -> Faded:
    size, tile = x.k.shape[-2], _tile(x.k.shape[-2])
    log_decay = tiles(x.log_decay, tile)
    exponents = matmul(everywhere(_from_middle(tile), log_decay), log_decay, HIGHEST)
    edge = jnp.zeros_like(exponents[..., :1, 0, :])
    first_halves, second_halves = log_decay[..., 0, :] - exponents[..., 0, :], exponents[..., -1, :]
    steps = jnp.concatenate([first_halves, edge], -2) + jnp.concatenate([edge, second_halves], -2)
    sums = jnp.exp(matmul(everywhere(_around(size // tile), steps), steps, HIGHEST))
    exponents = exponents.reshape(x.k.shape)
    from_middle, to_token = jnp.exp(exponents), jnp.exp(-exponents)
    before, after = jnp.split(jnp.repeat(sums[..., :-1, :], tile, axis=-2), 2, -2)
    return Faded(
        from_middle * x.beta * x.k,
        from_middle * x.q,
        to_token * x.k,
        from_middle,
        to_token,
        jnp.exp(steps[..., :-1, :]),
        before,
        after,
        sums[..., -1, :, None],
    )


@functools.cache
def _from_middle(tile: int) -> np.ndarray:
    """The tokens in G_i - m, 1 behind the middle and -1 before it [tile, tile]."""
    row, token = np.indices((tile, tile))
    behind = (token <= row) & (token >= tile // 2)
    return behind.astype(np.float32) - ((token > row) & (token < tile // 2))


@functools.cache
def _around(count: int) -> np.ndarray:
    """The steps from middle to middle in m of every tile, in G_C - m, and in G_C [2 tiles + 1, tiles + 1]."""
    tile, step = np.indices((count, count + 1))
    return np.concatenate([step <= tile, step > tile, np.ones((1, count + 1))]).astype(np.float32)


def _right_sides(faded: Faded) -> list[Float[Array, "*batch tokens K"]]:
    """What the rows of a tile are multiplied with: K_out of the tokens up to its end, faded on to its middle."""
    sides = []
    for tile, k_out in enumerate(jnp.split(faded.k_out, faded.between.shape[-2], -2)):
        earlier = [faded.between[..., tile, None, :] * sides[-1]] if sides else []
        sides.append(jnp.concatenate([*earlier, k_out], -2))
    return sides


def _rows(of_k: Float[Array, "*batch C n"], of_q: Float[Array, "*batch C n"]) -> list[Float[Array, "*batch rows n"]]:
    """What belongs to K_in and to Q_in, tile by tile: one product for both."""
    count = of_k.shape[-2] // _tile(of_k.shape[-2])
    pairs = zip(*(jnp.split(x, count, -2) for x in (of_k, of_q)), strict=True)
    return [jnp.concatenate(pair, -2) for pair in pairs]


def _both(rows: list[Float[Array, "*batch rows n"]]) -> list[Float[Array, "*batch C n"]]:
    """The reverse of `_rows`."""
    return [jnp.concatenate(halves, -2) for halves in zip(*(jnp.split(x, 2, -2) for x in rows), strict=True)]


def _products(rows: list[Array], right_sides: list[Array]) -> list[Float[Array, "*batch C C"]]:
    """Of every tile's rows with its right side; zeros to the right."""
    size = right_sides[-1].shape[-2]
    products = [matmul_nt(left, right, HIGHEST) for left, right in zip(rows, right_sides, strict=True)]
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])  # noqa: E731
    return _both([pad(x) for x in products])


def _left_bar(bars: list[Array], right_sides: list[Array]) -> list[Float[Array, "*batch C K"]]:
    """The cotangents of both left sides from those of the products."""
    pairs = zip(bars, right_sides, strict=True)
    return _both([matmul(bar[..., : right.shape[-2]], right, HIGHEST) for bar, right in pairs])


def _right_bar(bars: list[Array], rows: list[Array], between: Float[Array, "*batch tiles K"]) -> Array:
    """The cotangent of K_out [*batch, C, K] from those of both products, from the last tile to the first."""
    parts, passed = [], 0
    for a in reversed(range(len(rows))):
        tile = rows[a].shape[-2] // 2
        bar = passed + matmul_tn(bars[a][..., : (a + 1) * tile], rows[a], HIGHEST)
        parts.append(bar[..., -tile:, :])
        passed = between[..., a, None, :] * bar[..., :-tile, :]
    return jnp.concatenate(parts[::-1], -2)


def _sums(later: Float[Array, "*batch C K"], earlier: Float[Array, "*batch C K"], documents: Documents):
    """Of `later` over a token and all later ones, and of `earlier` over all earlier ones, of its document and chunk."""
    if documents.same is not True:  # what others have adds up to nothing, but for rounding
        row, token = np.indices((later.shape[-2],) * 2)
        pairs = [(token >= row, later), (token < row, earlier)]
        return sum(matmul((documents.same & jnp.asarray(seen)).astype(x.dtype), x, HIGHEST) for seen, x in pairs)
    # Products with ones: XLA on CPU would sum inside the product before, at a third of its speed.
    tile = _tile(later.shape[-2])
    both = jnp.concatenate([tiles(later, tile), tiles(earlier, tile)], -2)
    sums = matmul(everywhere(_in_tile(tile), both), both, HIGHEST)
    totals = jnp.concatenate([sums[..., tile, :], sums[..., tile + 1, :]], -2)
    count = totals.shape[-2] // 2
    others = np.concatenate([np.triu(np.ones((count, count)), 1), np.tril(np.ones((count, count)), -1)], 1)
    sums = sums[..., :tile, :] + matmul(everywhere(others, totals), totals, HIGHEST)[..., None, :]
    return sums.reshape(later.shape)


@functools.cache
def _in_tile(tile: int) -> np.ndarray:
    """A tile's part of `_sums` from both arrays, and then the total of each [tile + 2, 2 tiles]."""
    ones = np.ones((tile, tile))
    return np.block([[np.triu(ones), np.tril(ones, -1)], [ones[:1], 0 * ones[:1]], [0 * ones[:1], ones[:1]]])


def _documents(x: Chunks) -> Documents:
    if x.starts is None:
        return Documents(True, 1.0, 1.0, 1.0)
    begun = jnp.cumsum(x.starts.astype(jnp.int32), -1)
    number = lambda condition: condition.astype(x.k.dtype)  # noqa: E731
    return Documents(
        begun[..., :, None] == begun[..., None, :],
        number(begun == 0)[..., None],
        number(begun == begun[..., -1:])[..., None],
        number(begun[..., -1:] == 0)[..., None],
    )


def _masks(x: Chunks, documents: Documents) -> tuple[Array, Array]:
    """Whose key a token reads: earlier ones of its document, and its own too."""
    row, token = np.indices((x.k.shape[-2],) * 2)
    return documents.same & jnp.asarray(token < row), documents.same & jnp.asarray(token <= row)


def _where(mask, products):
    return jnp.where(mask, products, 0)


def _inverse(products: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + L)^-1 of a strictly lower triangle, tile by tile and then block by block."""
    chunk, size = products.shape[-1], min(delta_algebra.TILE, products.shape[-1])

    def blocks(row, column, size, step):
        corners = range(0, chunk, step)
        return jnp.stack([products[..., row + i :, column + i :][..., :size, :size] for i in corners], -3)

    diagonal = blocks(0, 0, size, size)
    inverse = tile_inverse([mask * diagonal for mask in level_masks(size)])
    while size < chunk:
        corner = blocks(size, 0, size, 2 * size)
        inverse = merge_inverse(inverse[..., 0::2, :, :], corner, inverse[..., 1::2, :, :])
        size *= 2
    return inverse[..., 0, :, :]
