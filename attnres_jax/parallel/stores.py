"""Slots along the first axis of a large array that a loop carries, read and updated where they lie.

XLA copies such an array at a condition, and at an update of it as a whole; in a loop it updates it in place, one slot a
turn. So a number of slots that is known only when the program runs is a loop of so many turns, and a condition is a
loop of one turn or none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from attnres_jax.depth.operator import slot_at
from attnres_jax.parallel.schedules import IDLE


def replace_slot(store: Array, place: Int[Array, ""], value: Array) -> Array:
    """`store` with the value at that place, unless it is `IDLE`."""
    place, used = jnp.maximum(place, 0), place != IDLE
    return jax.lax.dynamic_update_index_in_dim(store, jnp.where(used, value, slot_at(store, place)), place, 0)


def put_corner(store: Array, place: Int[Array, ""], value: Array) -> Array:
    """`store` with the value at that place, in the low corner of a slot that may be larger."""
    return jax.lax.dynamic_update_slice(store, value[None], (place, *[0] * value.ndim))


def take_corner(store: Array, place: Int[Array, ""], shape: tuple[int, ...]) -> Array:
    """So much of the low corner of the slot at that place."""
    return jax.lax.dynamic_slice(store, (place, *[0] * len(shape)), (1, *shape))[0]


def run_if(condition: Bool[Array, ""], body: Callable[[Any, Any], Any], reads: PyTree, carry: Any) -> Any:
    """`body(reads, carry)`, or `carry`.

    XLA takes out of a loop what does not depend on its counter, and computes it whatever the condition is. So the
    counter, which is 0, is added to `reads`: to be given to the body is what its work hangs on.
    """

    def turn(i: Int[Array, ""], carry: Any) -> Any:
        return body(jax.tree.map(lambda x: x + i.astype(x.dtype), reads), carry)

    return jax.lax.fori_loop(0, condition.astype(jnp.int32), turn, carry)


def write_slots(store: Array, first: Int[Array, ""], slots: tuple[Any, Any], new: Array) -> Array:
    """`store` with those slots of the pass at `first` replaced, from one to before another; a loop, run in place."""
    if not len(new):
        return store
    where = first + slots[0]
    put = lambda i, store: jax.lax.dynamic_update_index_in_dim(store, slot_at(new, i), where + i, 0)  # noqa: E731
    return jax.lax.fori_loop(0, slots[1] - slots[0], put, store)


def add_slots(store: Array, first: Int[Array, ""], slots: tuple[Any, Any], new: Array, kept: Int[Array, ""]) -> Array:
    """The same, added to what is in those of them that come before slot `kept`."""
    if not len(new):
        return store

    def put(i: Int[Array, ""], store: Array) -> Array:
        where = first + slots[0] + i
        old = jnp.where(slots[0] + i < kept, slot_at(store, where), 0)
        return jax.lax.dynamic_update_index_in_dim(store, old + slot_at(new, i), where, 0)

    return jax.lax.fori_loop(0, slots[1] - slots[0], put, store)


def clear_slots(store: Array, first: Int[Array, ""], count: Int[Array, ""]) -> Array:
    """`store` with so many zeros."""
    zero = jnp.zeros(store.shape[1:], store.dtype)
    put = lambda i, store: jax.lax.dynamic_update_index_in_dim(store, zero, first + i, 0)  # noqa: E731
    return jax.lax.fori_loop(0, count, put, store)


def take_slots(store: Array, first: Int[Array, ""], count: int) -> Array:
    """So many slots from `first` on."""
    return jnp.stack([slot_at(store, first + i) for i in range(count)]) if count else store[:0]
