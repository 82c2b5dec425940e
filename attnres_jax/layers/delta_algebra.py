"""What both forms of the delta rule in chunks stand on: rows laid out in chunks, small products and triangles."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnres_jax.layers.delta_rule import HIGHEST

TILE = 8  # tokens whose levels are one masked product a level: more than needed, in one go (4 and 16 cost the same)
UNROLLED = 8  # chunks at most between which states pass without a loop


class Plan(NamedTuple):
    """How a row is cut: `groups` times `group` chunks of `size` tokens."""

    size: int
    group: int
    groups: int
    rows: tuple[int, ...] = ()
    """The batch axis of what is cut: none for one row, since with an axis of 1 XLA on CPU (jax 0.10.2) computes much
    twice, in layouts that differ by nothing else."""

    @property
    def tokens(self) -> int:
        """Of the padded row."""
        return self.size * self.group * self.groups


class Chunks(NamedTuple):
    """A group of G chunks, or what belongs to it; chunk first since states pass from one to the next."""

    q: Float[Array, "G *rows H C K"]
    """q / sqrt(K)"""
    k: Float[Array, "G *rows H C K"]
    v: Float[Array, "G *rows H C V"]
    log_decay: Float[Array, "G *rows H C K"]
    beta: Float[Array, "G *rows H C 1"]
    starts: Bool[Array, "G *rows 1 C"] | None
    """Where documents begin; None: nowhere."""


@functools.cache
def level_masks(size: int) -> np.ndarray:
    """Which pairs of tokens meet at a level, 0 or 1 [levels, tile, tile]."""
    row, token = np.indices((size, size))
    blocks = (1 << level for level in range(size.bit_length() - 1))
    return np.stack([(row // b % 2 == 1) & (token // b == row // b - 1) for b in blocks]).astype(np.float32)


def everywhere(constant: np.ndarray, like: Array) -> Array:
    """A constant matrix for every batch index: as a batched product it gives the layout that the next one reads."""
    return jnp.broadcast_to(jnp.asarray(constant, like.dtype), (*like.shape[:-2], *constant.shape))


def tile_inverse(by_level: Sequence[Float[Array, "*batch n n"]]) -> Float[Array, "*batch n n"]:
    """(I + L)^-1 of a strictly lower triangle, given by what of it pairs the blocks of each level, zero elsewhere.

    With D the inverse of the blocks on the diagonal, D - D X D merges all pairs at once: of matrices this small one
    whole product costs less than slices, products of parts and their concatenation.
    """
    inverse = jnp.eye(by_level[0].shape[-1], dtype=by_level[0].dtype) - by_level[0]
    for pairs in by_level[1:]:
        inverse -= matmul(inverse, matmul(pairs, inverse, HIGHEST), HIGHEST)
    return inverse


def merge_inverse(above, corner, below):
    """The inverse of [[A, 0], [X, B]] from those of A and B."""
    return merge(above, -matmul(below, matmul(corner, above, HIGHEST), HIGHEST), below)


def merge(above, corner, below):
    """[[above, 0], [corner, below]]"""
    top = jnp.concatenate([above, jnp.zeros_like(above)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, below], -1)], -2)


def tiles(x: Float[Array, "*batch C K"], size: int) -> Float[Array, "*batch tiles tile K"]:
    """Consecutive tokens in tiles of `size`."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def matmul(a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    """a b"""
    return jnp.matmul(a, b, precision=precision)


def matmul_nt(a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    """a b^T, contracted in place: of `b.mT` XLA on CPU makes a copy where b is computed."""
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=precision)


def matmul_tn(a: Array, b: Array, precision: jax.lax.Precision | None) -> Array:
    """a^T b, contracted in place."""
    return jnp.einsum("...ki,...kj->...ij", a, b, precision=precision)


def dot(a: Float[Array, "*batch K"], b: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
    """Inner products, as a matrix product with ones: XLA on CPU (jax 0.10.2) reduces a last axis ten times slower, and
    programs of many such sums of products fused into one kernel have crashed."""
    return matmul(a * b, jnp.ones((a.shape[-1], 1), a.dtype), HIGHEST)[..., 0]


def groups_of(plan: Plan, x: Array) -> Array:
    """[B, T, ...] to [groups, *rows, tokens, ...], to loop over."""
    x = x.reshape(*plan.rows, plan.groups, -1, *x.shape[2:])
    return jnp.moveaxis(x, len(plan.rows), 0)


def row_of(plan: Plan, x: Array) -> Array:
    """The reverse of `groups_of`."""
    x = jnp.moveaxis(x, 0, len(plan.rows))
    return x.reshape(math.prod(plan.rows), plan.tokens, *x.shape[len(plan.rows) + 2 :])


def lay_out(plan: Plan, x: Array) -> Array:
    """[*rows, tokens, H, ...] of a group to [G, *rows, H, C, ...]"""
    rows = len(plan.rows)
    x = x.reshape(*plan.rows, plan.group, plan.size, *x.shape[rows + 1 :])
    return jnp.moveaxis(x, (rows, rows + 2), (0, rows + 1))


def lay_back(plan: Plan, x: Array) -> Array:
    """The reverse of `lay_out`."""
    rows = len(plan.rows)
    x = jnp.moveaxis(x, (0, rows + 1), (rows, rows + 2))
    return x.reshape(*plan.rows, -1, *x.shape[rows + 2 :])


def chunks_of(plan: Plan, group: tuple[Array | None, ...], dtype) -> Chunks:
    """From q, k, v, log decay, beta and starts of a group: in the loop, for copies of whole rows cost as much as a
    tenth of all (XLA on CPU, jax 0.10.2) and stay in memory."""
    q, k, v, log_decay, beta = (x.astype(dtype) for x in group[:-1])
    laid = (q / math.sqrt(q.shape[-1]), k, v, log_decay, beta[..., None])
    starts = None if group[-1] is None else lay_out(plan, group[-1][..., None])
    return Chunks(*(lay_out(plan, x) for x in laid), starts)


def chunks_of_transpose(plan: Plan, group: tuple[Array | None, ...], bars: Chunks) -> tuple[Array, ...]:
    """Cotangents of the first five of the group from those of its chunks."""
    q_bar, k_bar, v_bar, log_decay_bar, beta_bar = (lay_back(plan, bar) for bar in bars[:-1])
    out = (q_bar / math.sqrt(q_bar.shape[-1]), k_bar, v_bar, log_decay_bar, beta_bar[..., 0])
    return tuple(bar.astype(x.dtype) for bar, x in zip(out, group[:-1], strict=True))
