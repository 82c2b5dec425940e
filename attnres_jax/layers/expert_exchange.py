"""Experts that are spread over devices: every device has some of them, and its own tokens.

The exchange is dense and dropless, of collectives that every backend has. Devices that share out the experts gather
each other's tokens, each adds up what its own experts make of them all, and the sums are scattered back to where the
tokens came from. Of n such devices each sends its tokens to n - 1 others, where an exchange of routed tokens alone
would send them to at most K of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnres_jax.axes import mesh_axes_of, per_shard
from attnres_jax.layers.experts import experts


def experts_across_devices(
    x: Float[Array, "B T D"],
    indices: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: str,
    implementation: str,
) -> Float[Array, "B T D"]:
    """`experts` of all tokens; on each device for its own experts and its own of their channels F.

    Arguments and result are as of `experts`, with batch and sequence as two axes. Without a mesh it is that alone.
    """
    axes = mesh_axes_of(batch=x.shape[0], length=x.shape[1], experts=len(gate), mlp=gate.shape[-1])
    run = partial(experts, activation=activation, implementation=implementation)
    if not axes:
        return _flat(run, x, indices, weights, gate, up, down)
    exchanged = tuple(axis for axis in axes["experts"] if axis in axes["batch"])  # else the tokens are there already

    def own_part(x, indices, weights, gate, up, down):
        first = _index(axes["experts"]) * len(gate) if axes["experts"] else None
        tokens = x, indices, weights
        if exchanged:
            tokens = (jax.lax.all_gather(part, exchanged, tiled=True) for part in tokens)
        y = _flat(partial(run, first=first), *tokens, gate, up, down)
        if exchanged:
            y = jax.lax.psum_scatter(y, exchanged, tiled=True)
        summed = (*(axis for axis in axes["experts"] if axis not in exchanged), *axes["mlp"])
        return jax.lax.psum(y, summed) if summed else y

    tokens = P(axes["batch"], axes["length"], None)
    into, back = P(axes["experts"], None, axes["mlp"]), P(axes["experts"], axes["mlp"], None)
    run_all = per_shard(own_part, (tokens, tokens, tokens, into, into, back), tokens)
    return run_all(x, indices, weights, gate, up, down)


def _flat(run, x, indices, weights, *kernels):
    """Batch and sequence as one axis, and back."""
    y = run(*(part.reshape(-1, part.shape[-1]) for part in (x, indices, weights)), *kernels)
    return y.reshape(*x.shape[:2], -1)


def _index(axes: tuple[str, ...]) -> Int[Array, ""]:
    """Which part this device has of what is split over `axes`, outermost first."""
    index = jnp.int32(0)
    for axis in axes:
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index
