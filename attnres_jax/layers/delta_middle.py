"""The delta rule in chunks of mild decays, all of them taken from one token: the last of the chunk's first half.

Notation of `delta_chunks`, with m = G of that token. Then E_ij = exp(G_i - m) * exp(m - G_j), and every product with a
decay in it is a product of three arrays:

    K_in = beta * exp(G - m) * K      Q_in = exp(G - m) * Q      K_out = exp(m - G) * K
    L = tril(K_in K_out^T, -1)        P = tril(Q_in K_out^T)
    S_m = exp(m) * S
    V' = (I + L)^-1 (beta * V - K_in S_m)        O = Q_in S_m + P V'        S <- exp(G_C - m) * (S_m + K_out^T V')

Exponents are sums over at most half a chunk, of either sign. Up to `reach` no factor and no product of two overflows,
what is small keeps its digits, and rounding an exponent is an error of 40 * 2^-24 at worst.

A chunk may hold parts of several documents: pairs of different ones are masked, as is what a token of any but the first
reads of S, and what a token of any but the last leaves in it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnres_jax.layers.delta_algebra import (
    TILE,
    Plan,
    dot,
    everywhere,
    lay_out,
    level_masks,
    matmul,
    matmul_nt,
    matmul_tn,
    merge_inverse,
    row_of,
    state_precision,
    tile_inverse,
)
from attnres_jax.layers.delta_rule import HIGHEST


class Inputs(NamedTuple):
    """A group of G chunks, chunk first since states pass from one to the next."""

    q: Float[Array, "G B H C K"]
    """q / sqrt(K)"""
    k: Float[Array, "G B H C K"]
    v: Float[Array, "G B H C V"]
    log_decay: Float[Array, "G B H C K"]
    beta: Float[Array, "G B H C 1"]
    starts: Bool[Array, "G B 1 C"] | None
    """Where documents begin; None: nowhere."""


class Faded(NamedTuple):
    """What the products are of."""

    k_in: Float[Array, "G B H C K"]
    q_in: Float[Array, "G B H C K"]
    k_out: Float[Array, "G B H C K"]
    from_middle: Float[Array, "G B H C K"]
    """exp(G_i - m)"""
    to_token: Float[Array, "G B H C K"]
    """exp(m - G_i)"""
    before: Float[Array, "G B H K 1"]
    """exp(m)"""
    after: Float[Array, "G B H K 1"]
    """exp(G_C - m)"""


class Documents(NamedTuple):
    """Who has to do with whom, as factors 0 and 1 but for `same`; where no document begins, plain numbers."""

    same: Bool[Array, "G B 1 C C"] | bool
    first: Float[Array, "G B 1 C 1"] | float
    """Tokens of the document that the chunk begins with."""
    last: Float[Array, "G B 1 C 1"] | float
    """Tokens of the one that it ends with."""
    whole: Float[Array, "G B 1 1 1"] | float
    """Whether it is one document's."""


def reach(dtype) -> float:
    """The largest exponent taken: 40 in float32. Its exponential times itself and a long sum of such stay finite."""
    return 0.45 * math.log(float(jnp.finfo(dtype).max))


def is_mild(plan: Plan, log_decay: Float[Array, "B T H K"], dtype) -> Bool[Array, ""]:
    """Whether no channel fades by more than exp(-reach) in half a chunk."""
    half = plan.size // 2
    sums = jnp.sum(log_decay.astype(dtype).reshape(len(log_decay), -1, half, *log_decay.shape[2:]), 2)
    return jnp.min(sums) >= -reach(dtype)


def forward(plan, row, starts, state, save):
    """(reads, final state); if to be saved, S_m of every chunk, V', (I + L)^-1 and P of every group."""
    precision = state_precision(row)

    def one_group(state, x):
        faded, documents = _faded(x), _documents(x)
        strictly, lower = _masks(plan.size, documents)
        inverse = _inverse(_where(strictly, matmul_nt(faded.k_in, faded.k_out, HIGHEST)))
        scores = _where(lower, matmul_nt(faded.q_in, faded.k_out, HIGHEST))

        def pass_state(state, chunk):
            k_in, writing, targets, inverse, before, after, kept = chunk
            state = before * state
            new = matmul(inverse, targets - matmul(k_in, state, precision), precision)
            return kept * state + after * matmul_tn(writing, new, precision), (state, new)

        reading, writing = documents.first * faded.k_in, documents.last * faded.k_out
        chunks = (reading, writing, x.beta * x.v, inverse, *_passing(faded, documents))
        state, (states, new) = jax.lax.scan(pass_state, state, chunks)
        read = documents.first * matmul(faded.q_in, states, precision) + matmul(scores, new, precision)
        return state, (read, (states, new, inverse, scores) if save else None)

    state, (read, saved) = jax.lax.scan(one_group, state, _lay_out(plan, row, starts, state.dtype))
    return (row_of(read).astype(row[2].dtype), state), saved


def backward(plan, row, starts, saved, bars):
    """The derivative, group by group from the last (`x_bar` is the cotangent of x).

        V'_bar = P^T O_bar + K_out Z_bar           e = (I + L)^-T V'_bar, the cotangent of beta * V - K_in S_m
        L_bar  = -tril(e V'^T, -1)                 P_bar = tril(O_bar V'^T)
        K_in_bar  = L_bar K_out - e S_m^T          Q_in_bar = P_bar K_out + O_bar S_m^T
        K_out_bar = V' Z_bar^T + L_bar^T K_in + P_bar^T Q_in
        S_m_bar = Z_bar + Q_in^T O_bar - K_in^T e

    with Z_bar = exp(G_C - m) * S_bar. The exponent G_i - m takes K_in * K_in_bar + Q_in * Q_in_bar - K_out * K_out_bar;
    m takes S_m * S_m_bar summed over values, and G_C - m the same of the state after the chunk.
    """
    read_bar, state_bar = bars
    precision, dtype = state_precision(row), state_bar.dtype

    def one_group(state_bar, inputs):
        x, o_bar, (states, new, inverse, scores) = inputs
        faded, documents = _faded(x), _documents(x)
        strictly, lower = _masks(plan.size, documents)
        read_bar = documents.first * o_bar

        def pass_state(state_bar, chunk):
            k_in, writing, inverse, before, after, kept, new_bar, reading_bar = chunk
            sum_bar = after * state_bar
            targets_bar = matmul_tn(inverse, new_bar + matmul(writing, sum_bar, precision), precision)
            middle_bar = kept * state_bar + reading_bar - matmul_tn(k_in, targets_bar, precision)
            return before * middle_bar, (sum_bar, middle_bar, targets_bar)

        chunks = (
            documents.first * faded.k_in,
            documents.last * faded.k_out,
            inverse,
            *_passing(faded, documents),
            matmul_tn(scores, o_bar, precision),
            matmul_tn(faded.q_in, read_bar, precision),
        )
        state_bar, bars = jax.lax.scan(pass_state, state_bar, chunks, reverse=True)
        sum_bars, middle_bars, targets_bar = bars

        products_bar = _where(strictly, -matmul_nt(targets_bar, new, HIGHEST))
        scores_bar = _where(lower, matmul_nt(o_bar, new, HIGHEST))
        k_in_bar = matmul(products_bar, faded.k_out, HIGHEST)
        k_in_bar -= matmul_nt(documents.first * targets_bar, states, precision)
        q_in_bar = matmul(scores_bar, faded.k_out, HIGHEST) + matmul_nt(read_bar, states, precision)
        written_bar = documents.last * matmul_nt(new, sum_bars, precision)
        k_out_bar = written_bar + matmul_tn(products_bar, faded.k_in, HIGHEST)
        k_out_bar += matmul_tn(scores_bar, faded.q_in, HIGHEST)

        exponents_bar = faded.k_in * k_in_bar + faded.q_in * q_in_bar - faded.k_out * k_out_bar
        before_bar = dot(states, middle_bars)
        after_bar = dot(states, documents.whole * sum_bars)
        # A product with ones: XLA on CPU would sum inside the product before, at a third of its speed.
        after_bar += matmul(everywhere(np.ones((1, plan.size)), x.k), faded.k_out * written_bar, HIGHEST)[..., 0, :]
        log_decay_bar = matmul(everywhere(_from_middle(plan.size).T, x.k), exponents_bar, HIGHEST)
        log_decay_bar += _by_half(plan.size, before_bar, after_bar)
        rows_bar = faded.from_middle * k_in_bar  # of beta * k
        return state_bar, Inputs(
            faded.from_middle * q_in_bar,
            faded.to_token * k_out_bar + x.beta * rows_bar,
            x.beta * targets_bar,
            log_decay_bar,
            (dot(rows_bar, x.k) + dot(targets_bar, x.v))[..., None],
            None,
        )

    groups = (_lay_out(plan, row, starts, dtype), lay_out(plan, read_bar.astype(dtype)), saved)
    state_bar, bars = jax.lax.scan(one_group, state_bar, groups, reverse=True)
    return *_lay_out_transpose(row, bars), state_bar


def _faded(x: Inputs) -> Faded:
    exponents = matmul(everywhere(_from_middle(x.k.shape[-2]), x.k), x.log_decay, HIGHEST)
    from_middle, to_token = jnp.exp(exponents), jnp.exp(-exponents)
    before = jnp.exp(x.log_decay[..., 0, :] - exponents[..., 0, :])
    return Faded(
        from_middle * x.beta * x.k,
        from_middle * x.q,
        to_token * x.k,
        from_middle,
        to_token,
        before[..., None],
        from_middle[..., -1, :, None],
    )


@functools.cache
def _from_middle(size: int) -> np.ndarray:
    """The tokens in G_i - m, 1 behind the middle and -1 before it [C, C]."""
    row, token = np.indices((size, size))
    behind = (token <= row) & (token >= size // 2)
    return behind.astype(np.float32) - ((token > row) & (token < size // 2))


def _by_half(
    size: int, first: Float[Array, "*batch K"], second: Float[Array, "*batch K"]
) -> Float[Array, "*batch C K"]:
    """The one for every token of a chunk's first half, the other for those of its second."""
    in_first = np.arange(size)[:, None] < size // 2
    return jnp.where(in_first, first[..., None, :], second[..., None, :])


def _documents(x: Inputs) -> Documents:
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


def _masks(size: int, documents: Documents) -> tuple[Array, Array]:
    """Whose key a token reads: earlier ones of its document, and its own too."""
    row, token = np.indices((size, size))
    return documents.same & jnp.asarray(token < row), documents.same & jnp.asarray(token <= row)


def _where(mask, products):
    return jnp.where(mask, products, 0)


def _passing(faded: Faded, documents: Documents) -> tuple[Array, Array, Array]:
    """What the state fades by before a chunk's middle, after it, and after it if it is not forgotten."""
    return faded.before, faded.after, documents.whole * faded.after


def _inverse(products: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + L)^-1 of a strictly lower triangle, tile by tile and then block by block."""
    chunk, size = products.shape[-1], min(TILE, products.shape[-1])

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


def _lay_out(plan: Plan, row: tuple[Array, ...], starts, dtype) -> Inputs:
    """The row by groups, chunks and heads, once for all: XLA would put it into everything that reads a group."""
    q, k, v, log_decay, beta = (x.astype(dtype) for x in row)
    laid = (q / math.sqrt(q.shape[-1]), k, v, log_decay, beta[..., None])
    return Inputs(*(lay_out(plan, x) for x in laid), None if starts is None else lay_out(plan, starts[:, :, None]))


def _lay_out_transpose(row: tuple[Array, ...], bars: Inputs) -> tuple[Array, ...]:
    """Cotangents of the row's arrays from those of `_lay_out`."""
    q_bar, k_bar, v_bar, log_decay_bar, beta_bar = (row_of(bar) for bar in bars[:-1])
    out = (q_bar / math.sqrt(q_bar.shape[-1]), k_bar, v_bar, log_decay_bar, beta_bar[..., 0])
    return tuple(bar.astype(x.dtype) for bar, x in zip(out, row, strict=True))
