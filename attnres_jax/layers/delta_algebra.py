"""What both forms of the delta rule in chunks stand on: rows laid out in chunks, small products and triangles."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax.layers.delta_rule import HIGHEST

TILE = 8  # tokens whose levels are one masked product a level: more than needed, in one go (4 and 16 cost the same)
UNROLLED = 8  # chunks at most between which states pass without a loop


class Plan(NamedTuple):
    """How a row is cut: `groups` times `group` chunks of `size` tokens."""

    size: int
    group: int
    groups: int

    @property
    def tokens(self) -> int:
        """Of the padded row."""
        return self.size * self.group * self.groups


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


def state_precision(row: tuple[Array, ...]) -> jax.lax.Precision | None:
    """Of the products with states and values: half-precision values are not worth more than the fastest."""
    return HIGHEST if row[2].dtype.itemsize >= 4 else None


def lay_out(plan: Plan, x: Array) -> Array:
    """[B, T, H, ...] to [groups, G, B, H, C, ...]"""
    x = x.reshape(len(x), plan.groups, plan.group, plan.size, *x.shape[2:])
    if len(x) == 1:  # XLA on CPU (jax 0.10.2) copies twice where an axis of one is moved along
        return jnp.swapaxes(x[0], 2, 3)[:, :, None]
    return jnp.moveaxis(x, (1, 2, 0, 4, 3), (0, 1, 2, 3, 4))


def row_of(x: Array) -> Array:
    """The reverse of `lay_out`."""
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 2, 0, 4, 3))
    return x.reshape(len(x), -1, *x.shape[4:])
