"""Experts that are spread over devices: every device has some of them, and its own tokens.

Two exchanges, neither of which drops a token unless it is given less room than the worst case needs:

    dense     Devices that share out the experts gather each other's tokens, each adds up what its own experts make of
              them all, and the sums are scattered back. Collectives that every backend has. Of n such devices each gets
              the tokens of n - 1 others, and sends as many sums in float32.
    routed    A token travels to the experts it chose alone, once for each of them, and their outputs travel back, to be
              weighted and summed at home. Padding stays. One row for each assignment arrives sorted by expert, which
              needs no second permutation; a row for each device that has several of a token's experts would save fewer
              bytes than its sums, which are float32, cost.

`auto` is `routed` where the backend has a collective for it and fewer bytes travel, else `dense`: `is_routed_better`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from attnres_jax.axes import mesh_axes_of, mesh_platform, per_shard, split_of
from attnres_jax.layers.experts import combine, dispatch, experts, sort_by_expert, sorted_experts
from attnres_jax.layers.ragged_exchange import Slices, exchange, turned

EXCHANGES = ("auto", "routed", "dense")


def experts_across_devices(
    x: Float[Array, "B T D"],
    indices: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    valid: Bool[Array, "B T"] | None = None,
    activation: str,
    implementation: str,
    way: str = "auto",
    capacity: float = 0.0,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """`experts` of all tokens; on each device for its own experts and its own of their channels F.

    Arguments and result are as of `experts`, with batch and sequence as two axes. Without a mesh it is that alone.

    Args:
      x: the tokens.
      indices: see `experts`.
      weights: see `experts`.
      gate: see `experts`.
      up: see `experts`.
      down: see `experts`.
      valid: which tokens are no padding; None: all. What padding gets is the exchange's own: zero if routed.
      activation: see `experts`.
      implementation: see `experts`; `dense` has no sorted rows to exchange, so that its exchange is dense too.
      way: one of `EXCHANGES`.
      capacity: of a routed exchange, how many rows a device has room for, in even shares; 0: for all there could be.

    Returns:
      The weighted sums; and how many assignments of valid tokens an expert computed.
    """
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    axes = mesh_axes_of(batch=x.shape[0], length=x.shape[1], experts=len(gate), mlp=gate.shape[-1])
    run = partial(experts, activation=activation, implementation=implementation)
    if not axes:
        y = run(*map(_rows, (x, indices, weights)), gate, up, down)
        return y.reshape(*x.shape[:2], -1), _here(indices, valid, 0, len(gate))
    exchanged = tuple(axis for axis in axes["experts"] if axis in axes["batch"])  # else the tokens are there already
    into = split_of(gate.shape, "expert_kernels", "width", "mlp")
    back = split_of(down.shape, "expert_kernels", "mlp", "width")
    whole = partial(_whole, own=(*axes["experts"], *axes["mlp"]), dtype=x.dtype)

    def own_part(x, indices, weights, valid, gate, up, down):
        gate, up, down = whole(gate, into), whole(up, into), whole(down, back)
        tokens = tuple(map(_rows, (x, indices, weights, valid[..., None])))
        parts = jax.lax.axis_size(exchanged) if exchanged else 1
        routed = way == "routed" or (
            way == "auto"
            and mesh_platform() not in (None, "cpu")
            and is_routed_better(parts, indices.shape[-1], x.dtype.itemsize)
        )
        if parts > 1 and exchanged == axes["experts"] and implementation != "dense" and routed:
            products = partial(sorted_experts, activation=activation, implementation=implementation)
            y, computed = _routed(products, *tokens, gate, up, down, axes=exchanged, capacity=capacity)
        else:
            y, computed = _dense(run, *tokens, gate, up, down, split=axes["experts"], exchanged=exchanged)
        summed = (*(axis for axis in axes["experts"] if axis not in exchanged), *axes["mlp"])
        y = jax.lax.psum(y, summed) if summed else y
        over = tuple(dict.fromkeys((*axes["batch"], *axes["length"], *axes["experts"])))
        return y.reshape(*x.shape[:2], -1), jax.lax.psum(computed, over) if over else computed

    tokens, rows = P(axes["batch"], axes["length"], None), P(axes["batch"], axes["length"])
    run_all = per_shard(own_part, (tokens, tokens, tokens, rows, P(*into), P(*into), P(*back)), (tokens, P()))
    return run_all(x, indices, weights, valid, gate, up, down)


def is_routed_better(parts: int, experts_per_token: int, itemsize: int) -> bool:
    """Whether a routed exchange moves fewer bytes than a dense one at an even load.

    For a token of D channels on one of n devices, routed: K (n - 1) / n rows there and as many back, in the tokens'
    dtype. Dense: n - 1 rows there, and n - 1 in float32 back.

    Args:
      parts: n.
      experts_per_token: K.
      itemsize: bytes of a channel.
    """
    return 2 * experts_per_token * itemsize < parts * (itemsize + 4)


def plan_of(counts: Int[Array, "n E"], own: Int[Array, ""], room: int) -> tuple[Slices, Int[Array, " E_own"]]:
    """Where the assignments of device `own` go, and how many each of its experts gets.

    A device gets rows in order of its experts, and of their senders for each expert: what one sends to one expert is a
    slice. Of what there is no room for the ends of slices stay at home.

    Args:
      counts: how many assignments each device has for each expert; device d of n owns E / n of them from d E / n on.
      own: which device this is.
      room: how many rows a device can take.
    """
    parts = len(counts)
    arriving = counts.reshape(parts, parts, -1).transpose(1, 2, 0)  # by device, its expert, sender
    flat = arriving.reshape(parts, -1)
    first = jnp.cumsum(flat, axis=1) - flat
    kept = jnp.clip(room - first, 0, flat)
    first, kept = (jnp.where(kept > 0, first, 0).reshape(arriving.shape), kept.reshape(arriving.shape))
    slices = Slices(
        starts=jnp.cumsum(counts[own]) - counts[own],
        sizes=kept[:, :, own].reshape(-1),
        places=first[:, :, own].reshape(-1),
        arriving=kept[own].T.reshape(-1),
    )
    return slices, jnp.sum(kept[own], axis=1)


def _routed(products, x, indices, weights, valid, gate, up, down, *, axes, capacity):
    """The weighted sums of this device's tokens, and how many assignments its experts computed."""
    parts, (count, chosen) = jax.lax.axis_size(axes), indices.shape
    worst = parts * count * min(chosen, len(gate))
    room = min(worst, math.ceil(capacity * count * chosen)) if capacity else worst
    num_experts = parts * len(gate)
    order, inverse, counts = sort_by_expert(jnp.where(valid, indices, num_experts).reshape(-1), num_experts)
    slices, arrived = plan_of(jax.lax.all_gather(counts, axes), jax.lax.axis_index(axes), room)
    rows = exchange(dispatch(x, order, inverse, chosen), slices, room, axes)
    rows = products(rows, arrived, gate, up, down)
    rows = exchange(rows, turned(slices, axes), len(order), axes)
    return combine(rows, weights, order, inverse), jnp.sum(arrived)


def _dense(run, x, indices, weights, valid, gate, up, down, *, split, exchanged):
    """The same; the sums are over this device's experts where they are not exchanged."""
    first = jax.lax.axis_index(split) * len(gate) if split else None
    tokens = x, indices, weights, valid
    if exchanged:
        tokens = (jax.lax.all_gather(part, exchanged, tiled=True) for part in tokens)
    x, indices, weights, valid = tokens
    y = run(x, indices, weights, gate, up, down, first=first)
    if exchanged:
        y = jax.lax.psum_scatter(y, exchanged, tiled=True)
    return y, _here(indices, valid[:, 0], 0 if first is None else first, len(gate))


def _whole(kernels: Array, split: list[tuple[str, ...]], own: tuple[str, ...], dtype: jnp.dtype) -> Array:
    """Kernels put together that are split further than by what each device computes; they travel in `dtype`.

    Their gradient is summed in the kernels' own precision, and each device gets its part alone: left to the partitioner
    the sum would be whole on every device, for twice the bytes. The barrier keeps the part apart from the stack of all
    layers that it goes to: fused with that, XLA on TPU holds the whole.

    Args:
      kernels: this device's part.
      split: for each of their axes the mesh axes that it is split over.
      own: those of them over which they stay split.
      dtype: in which they are used.
    """
    further = [tuple(name for name in names if name not in own) for names in split]
    splits = [(axis, names) for axis, names in enumerate(further) if names]

    @jax.custom_vjp
    def gather(kernels):
        whole = kernels.astype(dtype)
        for axis, names in reversed(splits):
            whole = jax.lax.all_gather(whole, names, axis=axis, tiled=True)
        return whole.astype(kernels.dtype)

    def scatter(_, kernels_bar):
        for axis, names in splits:
            kernels_bar = jax.lax.psum_scatter(kernels_bar, names, scatter_dimension=axis, tiled=True)
        return (jax.lax.optimization_barrier(kernels_bar),)

    gather.defvjp(lambda kernels: (gather(kernels), None), scatter)
    return gather(kernels) if splits else kernels


def _here(indices, valid, first, count):
    """How many assignments of valid tokens are to the `count` experts from `first` on."""
    return jnp.sum((indices >= first) & (indices < first + count) & valid[..., None], dtype=jnp.int32)


def _rows(part):
    """Batch and sequence as one axis."""
    return part.reshape(-1, part.shape[-1])
