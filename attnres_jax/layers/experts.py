"""Many gated MLPs, each token through the few chosen for it; dropless: no expert has a capacity.

Three implementations of one function:

    ragged    rows sorted by expert, then `lax.ragged_dot`: what GPUs and TPUs have kernels for
    sorted    rows sorted by expert, then a loop over blocks of rows of one expert: for CPUs, where `ragged_dot`
              multiplies every row by every expert
    dense     every token through every expert, most of them with weight zero: the oracle, E / K times the work

`auto` takes `sorted` where the program runs on a CPU and `ragged` elsewhere, which is decided when it is compiled.

The backward passes are written by hand. A permutation's transpose is the inverse permutation, so that neither
direction scatters; and a grouped product keeps its two factors only, the kernels as they were given and not as they
were cast, and adds up the gradient of one expert at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnres_jax.layers.mlp import GATES

IMPLEMENTATIONS = ("auto", "ragged", "sorted", "dense")
LARGEST_BLOCK = 128  # rows; at 512 x 512, 64 take a quarter longer and 256 a tenth, most of whose last block is idle


def experts(
    x: Float[Array, "N D"],
    indices: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: str = "silu",
    implementation: str = "auto",
    first: int | Int[Array, ""] | None = None,
) -> Float[Array, "N D"]:
    """sum_k weights[n, k] * expert_(indices[n, k])(x[n]), where an expert is down(act(gate x, up x)).

    Args:
      x: the tokens; the experts run in its dtype.
      indices: the K experts of each token.
      weights: what their outputs are multiplied with, float32.
      gate: kernels, as are `up` and `down`; cast to the dtype of `x` where they are used.
      up: see `gate`.
      down: see `gate`.
      activation: a key of `GATES`.
      implementation: one of `IMPLEMENTATIONS`.
      first: the kernels are those of the experts from this one on, and there are others elsewhere, whose part of the
        sum is left out. None: they are all.

    Returns:
      The weighted sum, accumulated in and returned as float32 (float64 for float64 tokens).

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation of experts {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    if first is not None:  # an expert that is not here gets the number E, behind all others
        here = (indices >= first) & (indices < first + len(gate))
        indices, weights = jnp.where(here, indices - first, len(gate)), jnp.where(here, weights, 0)
    if implementation == "dense":
        return _dense(x, indices, weights, gate, up, down, activation)
    order, inverse, counts = sort_by_expert(indices.reshape(-1), len(gate))
    rows = dispatch(x, order, inverse, indices.shape[1])
    rows = sorted_experts(rows, counts, gate, up, down, activation, implementation, full=first is None)
    return combine(rows, weights, order, inverse)


def sorted_experts(
    rows: Float[Array, "R D"],
    counts: Int[Array, " E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    activation: str = "silu",
    implementation: str = "auto",
    full: bool = False,
) -> Float[Array, "R D"]:
    """Each row through its expert: the first counts[0] rows through expert 0, and so on.

    Args:
      rows: sorted by expert.
      counts: the rows of each expert; what is behind them is of no expert, and zero in the result.
      gate: see `experts`.
      up: see `experts`.
      down: see `experts`.
      activation: see `experts`.
      implementation: `auto`, `ragged` or `sorted`.
      full: there is nothing behind.
    """
    # What a grouped product leaves in rows of no expert is not defined, neither forward nor backward.
    own = (jnp.arange(len(rows)) < jnp.sum(counts))[:, None]
    kept = (lambda rows: rows) if full else lambda rows: jnp.where(own, rows, 0)
    rows = kept(rows)
    product = functools.partial(grouped_matmul, counts=counts, implementation=implementation)
    hidden = GATES[activation](product(rows, gate), product(rows, up))
    return kept(product(hidden, down))


def _dense(x, indices, weights, gate, up, down, activation):
    gate, up, down = (kernels.astype(x.dtype) for kernels in (gate, up, down))
    chosen = jax.nn.one_hot(indices, len(gate), dtype=weights.dtype)
    hidden = GATES[activation](jnp.einsum("nd,edf->enf", x, gate), jnp.einsum("nd,edf->enf", x, up))
    y = jnp.einsum("enf,efd->end", hidden, down)
    return jnp.einsum("nke,nk,end->nd", chosen, weights, y.astype(weights.dtype))


def sort_by_expert(
    chosen: Int[Array, " R"], num_experts: int
) -> tuple[Int[Array, " R"], Int[Array, " R"], Int[Array, " E"]]:
    """(the rows in order of their expert, the place of each row in that order, the rows of each expert)."""
    order = jnp.argsort(chosen, stable=True)
    counts = jnp.sum(chosen[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return order, jnp.argsort(order), counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dispatch(
    x: Float[Array, "N D"], order: Int[Array, " R"], inverse: Int[Array, " R"], copies: int
) -> Float[Array, "R D"]:
    """Every token `copies` times, in the given order of the R = N * copies rows."""
    return x[order // copies]


def _dispatch_forward(x, order, inverse, copies):
    return dispatch(x, order, inverse, copies), inverse


def _dispatch_backward(copies, inverse, rows_bar):
    bars = rows_bar[inverse].reshape(-1, copies, rows_bar.shape[-1])
    return jnp.sum(bars, axis=1, dtype=_wide(bars)).astype(rows_bar.dtype), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
    rows: Float[Array, "R D"], weights: Float[Array, "N K"], order: Int[Array, " R"], inverse: Int[Array, " R"]
) -> Float[Array, "N D"]:
    """The weighted sum of each token's rows, which lie in the given order; in the dtype of the weights."""
    own = rows[inverse].reshape(*weights.shape, -1)
    return jnp.sum(weights[..., None] * own.astype(weights.dtype), axis=1)


def _combine_forward(rows, weights, order, inverse):
    return combine(rows, weights, order, inverse), (rows, weights, order, inverse)


def _combine_backward(saved, y_bar):
    rows, weights, order, inverse = saved
    bars = y_bar[order // weights.shape[1]]
    weights_bar = jnp.sum(bars * rows.astype(bars.dtype), axis=-1)[inverse].reshape(weights.shape)
    return (weights.reshape(-1)[order, None] * bars).astype(rows.dtype), weights_bar, None, None


combine.defvjp(_combine_forward, _combine_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows: Float[Array, "R D"], kernels: Float[Array, "E D F"], counts: Int[Array, " E"], implementation: str = "auto"
) -> Float[Array, "R F"]:
    """Each row times its expert's kernel: the first counts[0] rows are expert 0's, and so on.

    Args:
      rows: sorted by expert.
      kernels: cast to the dtype of `rows`; their gradient has their own.
      counts: the rows of each expert; they add up to R.
      implementation: `auto`, `ragged` or `sorted`.
    """
    return _by_platform(_sorted_matmul, _ragged_matmul, implementation, rows, kernels, counts)


def _grouped_matmul_forward(rows, kernels, counts, implementation):
    return grouped_matmul(rows, kernels, counts, implementation), (rows, kernels, counts)


def _grouped_matmul_backward(implementation, saved, y_bar):
    rows, kernels, counts = saved
    transposed = (functools.partial(f, transpose=True) for f in (_sorted_matmul, _ragged_matmul))
    rows_bar = _by_platform(*transposed, implementation, y_bar, kernels, counts)
    outer = (functools.partial(f, dtype=kernels.dtype) for f in (_sorted_outer, _ragged_outer))
    return rows_bar, _by_platform(*outer, implementation, rows, y_bar, counts), None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def _by_platform(on_cpu, elsewhere, implementation, *arrays):
    if implementation == "auto":
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)
    return (on_cpu if implementation == "sorted" else elsewhere)(*arrays)


def _ragged_matmul(rows, kernels, counts, transpose=False):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(rows, kernels.astype(rows.dtype), counts, numbers)


def _ragged_outer(rows, y_bar, counts, dtype):
    """rows^T y_bar of each expert's rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(rows, y_bar, counts, numbers, preferred_element_type=dtype)


def _sorted_matmul(rows, kernels, counts, transpose=False):
    """A block that reaches into the next experts' rows is wrong there until their turn comes.

    The kernel is taken once an expert: a copy for every block would be a seventh of the time. Half precision is
    multiplied into float32 and rounded here, which takes a fifth less than the matmul's own rounding.
    """
    if not len(rows):
        return jnp.zeros((0, kernels.shape[1 if transpose else 2]), rows.dtype)
    block, starts = _block_size(len(rows), len(counts)), jnp.cumsum(counts) - counts

    def expert(index, y):
        kernel = jax.lax.dynamic_index_in_dim(kernels, index, keepdims=False).astype(rows.dtype)

        def multiply(step, y):
            first = starts[index] + step * block
            at, place = _window(first, block, len(rows))
            new = _product(_slice(rows, at, block), kernel, 1, 1 if transpose else 0).astype(rows.dtype)
            new = jnp.where((place >= first)[:, None], new, _slice(y, at, block))
            return jax.lax.dynamic_update_slice_in_dim(y, new, at, 0)

        return jax.lax.fori_loop(0, -(-counts[index] // block), multiply, y)

    y = jnp.zeros((len(rows), kernels.shape[1 if transpose else 2]), rows.dtype)
    return jax.lax.fori_loop(0, len(counts), expert, y)


def _sorted_outer(rows, y_bar, counts, dtype):
    """rows^T y_bar of each expert's rows, a block at a time into the sum of one expert, which is float32."""
    shape = (rows.shape[1], y_bar.shape[1])
    if not len(rows):
        return jnp.zeros((len(counts), *shape), dtype)
    block, starts = _block_size(len(rows), len(counts)), jnp.cumsum(counts) - counts

    def expert(index, kernels_bar):
        def add(step, kernel_bar):
            first = starts[index] + step * block
            at, place = _window(first, block, len(rows))
            own = (place >= first) & (place < starts[index] + counts[index])
            left = jnp.where(own[:, None], _slice(rows, at, block), 0)
            return kernel_bar + _product(left, _slice(y_bar, at, block), 0, 0)

        kernel_bar = jax.lax.fori_loop(0, -(-counts[index] // block), add, jnp.zeros(shape, _wide(rows)))
        return jax.lax.dynamic_update_index_in_dim(kernels_bar, kernel_bar.astype(dtype), index, 0)

    return jax.lax.fori_loop(0, len(counts), expert, jnp.zeros((len(counts), *shape), dtype))


def _block_size(rows, num_experts):
    """A power of two, about half an even share of the rows: an expert's last block is half empty on average."""
    share = max(8, rows // (2 * num_experts))
    return min(rows, LARGEST_BLOCK, 1 << (share.bit_length() - 1))


def _window(first, block, rows):
    """Where to read a block that begins at `first` so that it ends within the rows: (there, its rows' indices)."""
    at = jnp.minimum(first, rows - block)
    return at, at + jnp.arange(block)


def _slice(array, at, block):
    return jax.lax.dynamic_slice_in_dim(array, at, block)


def _product(left, right, left_axis, right_axis):
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=_wide(left))


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
