"""The depth-attention operator: a softmax over earlier outputs, whole or in two phases (Attention Residuals, 2 to 4).

A site with query w and key scale g gives source v the logit w . (g * v / rms(v)) and reads the softmax-weighted sum of
the sources themselves: keys are RMS-normalised, values are not, and there is no 1/sqrt(D). A block has two phases:

    inter_block    phase 1: all sites of the block over the completed sources, in one pass over the bank
    merge          phase 2: one site's phase 1 and the partial sum of its own block, by online softmax

Statistics, logits and sums are float32 at highest precision even if the sources are bfloat16 (and float64 if they are).
The backward passes are written by hand: they keep their inputs and per-token scalars, never a copy of the sources, and
recompute the rest. There is no forward mode (`jax.jvp`, `jax.linearize`) beside them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from attnres_jax.arrays import FLOATS, expect

HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would multiply float32 in bfloat16 passes, GPUs in TF32
READ_CHUNK = 4  # sources added to the running sums at a time: the sums are read and written once for all of them


class State(NamedTuple):
    """Phase 1 of S sites: an unfinished softmax, float32. Only numerator / denominator has a meaning of its own.

    `maximum` is the logit that the exponents were taken against. It cancels, so gradients treat it as a constant.
    """

    numerator: Float[Array, "*sites_batch D"]
    maximum: Float[Array, "*sites_batch"]
    denominator: Float[Array, "*sites_batch"]

    def site(self, index: int) -> "State":
        """One site's part."""
        return State(self.numerator[index], self.maximum[index], self.denominator[index])


def depth_attention(
    sources: Float[Array, "N *batch D"],
    query: Float[Array, " D"],
    key_scale: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
    return_weights: bool = False,
) -> Float[Array, "*batch D"] | tuple[Float[Array, "*batch D"], Float[Array, "N *batch"]]:
    """Mixes `sources` with weights softmax_n(query . (key_scale * RMSNorm(source_n))) (eqs. 2-4).

    Differentiable in reverse mode only.

    Args:
      sources: earlier outputs, in the model's dtype.
      query: the site's pseudo-query w. Zero gives the mean of the sources.
      key_scale: the site's RMSNorm gain; None stands for ones.
      eps: added to the mean square of a source.
      return_weights: also return the float32 weights, which sum to one over N.

    Raises:
      ValueError: if there are no sources, or an argument is not of its shape or not of floats.
    """
    expect(FLOATS, ("N", "*batch", "D"), {"sources": sources})
    expect(FLOATS, sources.shape[-1:], {"query": query})
    key_scale = jnp.ones_like(query) if key_scale is None else key_scale
    expect(FLOATS, query.shape, {"key_scale": key_scale})
    if not len(sources):
        raise ValueError(f"sources of shape {sources.shape}: a site needs at least one")
    state = inter_block(sources, query[None], key_scale[None], len(sources), eps=eps)
    mixed = normalise(state.site(0)).astype(sources.dtype)
    if not return_weights:
        return mixed
    return mixed, jax.nn.softmax(depth_logits(sources, query[None], key_scale[None], eps)[0], axis=0)


def inter_block(
    bank: Float[Array, "N *batch D"],
    queries: Float[Array, "S D"],
    key_scales: Float[Array, "S D"] | None,
    num_valid: int | Int[Array, ""],
    *,
    eps: float = 1e-6,
) -> State:
    """Phase 1: what the S sites of a block take from the completed sources (Algorithm 1).

    Differentiable in reverse mode only.

    Args:
      bank: sources; slots from `num_valid` on have no influence and may hold anything finite.
      queries: the pseudo-queries of the block's sites.
      key_scales: their RMSNorm gains; None stands for ones.
      num_valid: completed sources, at least 1.
      eps: added to the mean square of a source.

    Returns:
      Unnormalised numerator [S, *batch, D], running maximum and denominator [S, *batch].

    Raises:
      ValueError: if `num_valid`, where it is no traced array, is not from 1 to N; if an argument is not of its shape
        or not of floats.
    """
    expect(FLOATS, ("N", "*batch", "D"), {"bank": bank})
    expect(FLOATS, ("S", bank.shape[-1]), {"queries": queries})
    key_scales = jnp.ones_like(queries) if key_scales is None else key_scales
    expect(FLOATS, queries.shape, {"key_scales": key_scales})
    if not isinstance(num_valid, jax.core.Tracer) and np.asarray(num_valid).item() not in range(1, len(bank) + 1):
        raise ValueError(f"num_valid={num_valid} of a bank of {len(bank)} sources must be from 1 to {len(bank)}")
    logits = jnp.moveaxis(depth_logits(bank, queries, key_scales, eps), 0, 1)
    weights, maximum, denominator = exponents(logits, num_valid)
    return State(mix(bank, weights, num_valid), maximum, denominator)


def merge(
    state: State,
    partial: Float[Array, "*batch D"],
    query: Float[Array, " D"],
    key_scale: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "*batch D"]:
    """Phase 2: a site's share of the bank and its block's partial sum under one softmax (Algorithm 1, lines 8-13).

    Differentiable in reverse mode only.

    Args:
      state: the site's part of `inter_block`.
      partial: the running sum of the site's own block; the result has its dtype.
      query: the site's pseudo-query.
      key_scale: its RMSNorm gain; None stands for ones.
      eps: added to the mean square of a source.

    Raises:
      ValueError: if an argument is not of its shape or not of floats.
    """
    expect(FLOATS, ("*batch", "D"), {"partial": partial})
    expect(FLOATS, partial.shape, {"state.numerator": state.numerator}, "; one site's part is state.site(i)")
    expect(FLOATS, partial.shape[-1:], {"query": query})
    key_scale = jnp.ones_like(query) if key_scale is None else key_scale
    expect(FLOATS, query.shape, {"key_scale": key_scale})
    return merge_sources(state, (partial,), depth_logits(partial, query[None], key_scale[None], eps))


@jax.custom_vjp
def normalise(state: State) -> Float[Array, "*sites_batch D"]:
    """Finishes the softmax of sites that read the bank alone; float32. Differentiable in reverse mode only."""
    return state.numerator / state.denominator[..., None]


def _normalise_forward(state):
    mixed = normalise(state)
    return mixed, (mixed, state.maximum, state.denominator)


def _normalise_backward(saved, mixed_bar):
    mixed, maximum, denominator = saved
    (mean,) = dots([(mixed_bar, mixed)])
    return (State(mixed_bar / denominator[..., None], jnp.zeros_like(maximum), -mean / denominator),)


normalise.defvjp(_normalise_forward, _normalise_backward)


def depth_logits(
    sources: Float[Array, "*batch D"], queries: Float[Array, "S D"], key_scales: Float[Array, "S D"], eps: float
) -> Float[Array, "S *batch"]:
    """The logits queries . (key_scales * RMSNorm(sources)) of every source at S sites, float32 (eq. 2)."""
    return logits_and_rms(sources, folded(queries, key_scales), eps)[0]


def folded(queries: Float[Array, "S D"], key_scales: Float[Array, "S D"]) -> Float[Array, "S D"]:
    """What of both enters a logit: w . (g * v) = (w * g) . v; wide also where both are kept in bfloat16."""
    return wide(queries) * wide(key_scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def logits_and_rms(
    sources: Float[Array, "*batch D"], queries: Float[Array, "S D"], eps: float
) -> tuple[Float[Array, "S *batch"], Float[Array, "*batch"]]:
    """`depth_logits` of `folded` queries, and the `reciprocal_rms` in them: with both, `logits_transpose` needs no
    forward pass."""
    return _logits_forward(sources, queries, eps)[0]


def _logits_forward(sources, queries, eps):
    # Without batch axes of one: XLA on CPU would copy a slot of a bank twice, for the product and for the mean square.
    *batch, width = sources.shape
    values = wide(sources).reshape(*(n for n in batch if n != 1), width)
    rms = reciprocal_rms(values, eps)
    logits = jnp.einsum("...d,sd->...s", values, queries.astype(values.dtype), precision=HIGHEST)
    logits = jnp.moveaxis(logits, -1, 0) * rms
    logits, rms = logits.reshape(len(queries), *batch), rms.reshape(batch)
    return (logits, rms), (sources, queries, rms, logits)


def logits_transpose(
    sources: Float[Array, "*batch D"],
    queries: Float[Array, "S D"],
    rms: Float[Array, "*batch"],
    logits: Float[Array, "S *batch"],
    logits_bar: Float[Array, "S *batch"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "S D"]]:
    """The backward pass of `logits_and_rms` from its results: the cotangents of sources and folded queries.

    Where it is called source by source, nothing but a sum over tokens may be left to do with the latter: over devices,
    the compiler then adds them up once, and not in every turn of the loop.
    """
    values = wide(sources)
    scaled = logits_bar * rms
    # d logit / d v = rms (w g - v rms logit / D): the second term is the derivative of the normalisation.
    along = jnp.sum(scaled * logits, axis=0) * rms / sources.shape[-1]
    # Not as a product, for which a TPU would copy a bank that `mix_transpose` reads into another layout.
    sources_bar = sum(s[..., None] * w for s, w in zip(scaled, queries.astype(values.dtype), strict=True))
    queries_bar = jnp.einsum("s...,...d->sd", scaled, values, precision=HIGHEST)
    return (sources_bar - along[..., None] * values).astype(sources.dtype), queries_bar.astype(queries.dtype)


logits_and_rms.defvjp(_logits_forward, lambda eps, saved, bars: logits_transpose(*saved, bars[0]))


def reciprocal_rms(sources: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch"]:
    """1 / sqrt(mean(source^2) + eps), a constant to gradients: `depth_logits` accounts for it itself."""
    values = wide(sources)
    return jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(values * values, axis=-1) + eps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_rms(y: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch D"]:
    """An output divided by its root mean square; for its backward pass it keeps `y` and one number a token."""
    return _unit_rms_forward(y, eps)[0]


def _unit_rms_forward(y, eps):
    rms = reciprocal_rms(y, eps)
    return (wide(y) * rms[..., None]).astype(y.dtype), (y, rms)


def _unit_rms_backward(eps, saved, bar):
    y, rms = saved
    values, bar = wide(y), wide(bar)
    along = dots([(bar, values)])[0] * rms * rms / y.shape[-1]
    return ((rms[..., None] * (bar - along[..., None] * values)).astype(y.dtype),)


unit_rms.defvjp(_unit_rms_forward, _unit_rms_backward)


def exponents(
    logits: Float[Array, "N S *batch"], num_valid: int | Int[Array, ""]
) -> tuple[Float[Array, "N S *batch"], Float[Array, "S *batch"], Float[Array, "S *batch"]]:
    """The softmax over the first `num_valid` sources, not yet divided: (exponents, their maximum, their sum)."""
    valid = jnp.arange(len(logits)).reshape(-1, *(1,) * (logits.ndim - 1)) < num_valid
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=0, where=valid, initial=-jnp.inf))
    weights = jnp.exp(jnp.where(valid, logits - maximum, -jnp.inf))  # masked before exp: no NaN in the gradient
    return weights, maximum, jnp.sum(weights, axis=0)


@jax.custom_vjp
def mix(
    values: Float[Array, "M *batch D"],
    weights: Float[Array, "N S *batch"],
    num_valid: int | Int[Array, ""],
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "S *batch D"]:
    """The sums over sources sum_n weights[n, s] * values[first + n] of `num_valid` of them; float32.

    No other is read.
    """
    num_valid, last = jnp.asarray(num_valid), len(weights) - 1

    def products(step, slot):
        slot = step * READ_CHUNK + slot
        weight = jnp.where(slot < num_valid, slot_at(weights, jnp.minimum(slot, last)), 0)
        value = wide(slot_at(values, first + jnp.minimum(slot, last)))
        return [w[..., None] * value for w in weight]

    def add(step, mixed):
        for slot in range(READ_CHUNK):
            mixed = [m + product for m, product in zip(mixed, products(step, slot), strict=True)]
        return mixed

    # The first chunk is a sum by itself: zeros to start from would be written and read once more than they need be.
    mixed = [sum(parts) for parts in zip(*(products(0, slot) for slot in range(READ_CHUNK)), strict=True)]
    return jnp.stack(jax.lax.fori_loop(1, (num_valid + READ_CHUNK - 1) // READ_CHUNK, add, mixed))


def _mix_forward(values, weights, num_valid, first):
    return mix(values, weights, num_valid, first), (values, weights, num_valid, first)


def _mix_backward(saved, mixed_bar):
    values, weights, *where = saved
    num_valid, first = map(jnp.asarray, where)  # inside a condition constants come back as NumPy scalars
    bars = mix_transpose(values, weights, num_valid, list(mixed_bar), jnp.zeros_like(values), first)
    return *bars[:2], None, None


mix.defvjp(_mix_forward, _mix_backward)


def mix_transpose(
    values: Float[Array, "M *batch D"],
    weights: Float[Array, "N S *batch"],
    num_valid: int | Int[Array, ""],
    mixed_bar: Sequence[Float[Array, "*batch D"]],
    values_bar: Float[Array, "M ..."],
    first: int | Int[Array, ""] = 0,
    through_weights: Callable[[Int[Array, ""], Array, Array], tuple[Array, PyTree]] = lambda *_: (0, ()),
) -> tuple[Float[Array, "M ..."], Float[Array, "N S *batch"], PyTree]:
    """The backward pass of `mix`, added into `values_bar` in one pass over the valid slots.

    Args:
      values: as in `mix`.
      weights: as in `mix`.
      num_valid: as in `mix`.
      mixed_bar: the cotangent of each of the S sums.
      values_bar: what to add to; channels may be cut into groups in one and not in the other.
      first: as in `mix`.
      through_weights: where the weights depend on the values, their backward pass in the same go: from a source's
        number, its value in float32 and the cotangent of its weights, those of (the value, anything else).

    Returns:
      The updated cotangent of the values, the cotangent of the weights, and the sum of what went to anything else.
    """

    def terms(source):
        value, weight = wide(slot_at(values, first + source)), slot_at(weights, source)
        weight_bar = jnp.stack(dots([(bar, value) for bar in mixed_bar]))
        through, other_bar = through_weights(source, value, weight_bar)
        return sum(weight[s, ..., None] * bar for s, bar in enumerate(mixed_bar)) + through, weight_bar, other_bar

    def add(source, carry):
        values_bar, weights_bar, others_bar, _ = carry
        new, weight_bar, other_bar = terms(source)
        new = new.reshape(values_bar.shape[1:])
        new = (wide(slot_at(values_bar, first + source)) + new).astype(values_bar.dtype)
        return (
            jax.lax.dynamic_update_index_in_dim(values_bar, new, first + source, 0),
            jax.lax.dynamic_update_index_in_dim(weights_bar, weight_bar, source, 0),
            jax.tree.map(jnp.add, others_bar, other_bar),
            new,  # carried along so that XLA on CPU computes it in parallel, and not inside the serial update
        )

    others_bar = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(terms, 0)[2])
    carry = (values_bar, jnp.zeros_like(weights), others_bar, jnp.zeros_like(values_bar[0]))
    return jax.lax.fori_loop(0, num_valid, add, carry)[:3]


def slot_at(slots: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """One slot of a bank, or of any arrays along their first axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), slots)


def dots(
    pairs: Sequence[tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]],
) -> Sequence[Float[Array, "*batch"]]:
    """Inner products over the last axis as one variadic reduction, which reads what the pairs share once.

    XLA on CPU runs the einsum half as fast, and separate sums five times slower.
    """
    products = tuple(left * right for left, right in pairs)
    zeros = tuple(jnp.zeros((), product.dtype) for product in products)
    add = lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True))  # noqa: E731
    return jax.lax.reduce(products, zeros, add, (products[0].ndim - 1,))


@jax.custom_vjp
def merge_sources(
    state: State, sources: tuple[Float[Array, "*batch D"], ...], logits: Float[Array, "K *batch"]
) -> Float[Array, "*batch D"]:
    """Phase 2 from given logits: a site's share of the bank and K further sources under one softmax."""
    return _merge_forward(state, sources, logits)[0]


def _merge_forward(state, sources, logits):
    inter, weights = _merge_weights(state.maximum, state.denominator, logits)
    mixed = inter[..., None] * state.numerator
    mixed += sum(w[..., None] * wide(s) for w, s in zip(weights, sources, strict=True))
    mixed = mixed.astype(sources[0].dtype)
    # The result is what the sublayer keeps as its input: with it, the backward pass does without the numerator.
    return mixed, (state.maximum, state.denominator, sources, logits, mixed)


def _merge_backward(saved, mixed_bar):
    maximum, denominator, sources, logits, mixed = saved
    inter, weights = _merge_weights(maximum, denominator, logits)
    mixed_bar = wide(mixed_bar)
    mean, *source_dots = dots([(mixed_bar, wide(x)) for x in (mixed, *sources)])
    state_bar = State(inter[..., None] * mixed_bar, jnp.zeros_like(maximum), -inter * mean)
    sources_bar = tuple(
        (w[..., None] * mixed_bar).astype(source.dtype) for w, source in zip(weights, sources, strict=True)
    )
    return state_bar, sources_bar, weights * (jnp.stack(source_dots) - mean)


def _merge_weights(state_maximum, denominator, logits):
    """What multiplies the numerator, and the weights of the further sources."""
    maximum = jnp.maximum(state_maximum, jnp.max(logits, axis=0))
    scale, exps = jnp.exp(state_maximum - maximum), jnp.exp(logits - maximum)
    total = scale * denominator + jnp.sum(exps, axis=0)
    return scale / total, exps / total


merge_sources.defvjp(_merge_forward, _merge_backward)


def wide(x: Array) -> Array:
    """At least float32: where statistics, weights and sums are computed, whatever the sources' dtype."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
