"""Rows that travel between devices, any number from each to each: `lax.ragged_all_to_all`, or the same by hand.

The TPU and GPU backends have that collective, the CPU's has not. There plain collectives do what it does, at the bytes
of an all-gather: for tests, and so that the same program runs anywhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Slices(NamedTuple):
    """Which of one device's rows go where: slices of successive rows, so many for each of n devices, in their order."""

    starts: Int[Array, " S"]
    """Where each begins among this device's rows."""
    sizes: Int[Array, " S"]
    places: Int[Array, " S"]
    """Where each will begin among the rows of the device that gets it."""
    arriving: Int[Array, " S"]
    """The sizes of the slices that this device gets, in the order of the devices they come from."""


def turned(slices: Slices, axes: tuple[str, ...]) -> Slices:
    """The way back: from where the rows arrived to where they came from."""
    over = partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True)
    return Slices(over(slices.places), slices.arriving, over(slices.starts), slices.sizes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: Float[Array, "R D"], slices: Slices, room: int, axes: tuple[str, ...]) -> Float[Array, "room D"]:
    """The rows that arrive at this device, where the senders' `places` say; zero elsewhere. Inside `shard_map` only.

    Its derivative is the exchange back.

    Args:
      rows: of this device; those in no slice stay.
      slices: where they go; no two go to the same place, and all to places below `room`.
      room: how many rows the result has.
      axes: mesh axes of the devices that exchange.
    """
    there = jnp.zeros((room, rows.shape[1]), rows.dtype)
    by_hand, native = partial(_by_hand, axes=axes), partial(_native, axes=axes)
    return jax.lax.platform_dependent(rows, there, *slices, cpu=by_hand, default=native)


def _exchange_forward(rows, slices, room, axes):
    return exchange(rows, slices, room, axes), (slices, len(rows))


def _exchange_backward(room, axes, saved, rows_bar):
    slices, count = saved
    return exchange(rows_bar, turned(slices, axes), count, axes), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _native(rows, there, starts, sizes, places, arriving, *, axes):
    return jax.lax.ragged_all_to_all(rows, there, starts, sizes, places, arriving, axis_name=axes)


def _by_hand(rows, there, starts, sizes, places, arriving, *, axes):
    """What the sizes of a slice disagree about is not defined there and NaN here."""
    every = jax.lax.all_gather(rows, axes)
    over = partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True)
    starts, sizes, places = over(starts), over(sizes), over(places)
    sender = jnp.repeat(jnp.arange(len(every)), len(starts) // len(every))
    at = jnp.arange(len(there))[:, None]
    inside = (at >= places) & (at < places + arriving)
    which = jnp.argmax(inside, axis=1)
    found = every[sender[which], starts[which] + at[:, 0] - places[which]]
    found = jnp.where((sizes == arriving)[which][:, None], found, jnp.nan)
    return jnp.where(jnp.any(inside, axis=1)[:, None], found, there)
