"""The depth-attention operator: a softmax over earlier outputs, whole or in two phases (Attention Residuals, 2 to 4).

A site with query w and key scale g gives source v the logit w . (g * v / rms(v)) and reads the softmax-weighted sum of
the sources themselves: keys are RMS-normalised, values are not, and there is no 1/sqrt(D). A block has two phases:

    inter_block    phase 1: all sites of the block over the completed sources, in one pass over the bank
    merge          phase 2: one site's phase 1 and the partial sum of its own block, by online softmax

Statistics, logits and sums are float32 at highest precision even if the sources are bfloat16 (and float64 if they are).
The backward passes are written by hand: they keep their inputs and per-token scalars, never a copy of the sources, and
recompute the rest.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would multiply float32 in bfloat16 passes, GPUs in TF32


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

    Args:
      sources: earlier outputs, in the model's dtype.
      query: the site's pseudo-query w. Zero gives the mean of the sources.
      key_scale: the site's RMSNorm gain; None stands for ones.
      eps: added to the mean square of a source.
      return_weights: also return the float32 weights, which sum to one over N.
    """
    state = inter_block(sources, query[None], None if key_scale is None else key_scale[None], len(sources), eps=eps)
    mixed = normalise(state.site(0)).astype(sources.dtype)
    if not return_weights:
        return mixed
    key_scale = jnp.ones_like(query) if key_scale is None else key_scale
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

    Args:
      bank: sources; slots from `num_valid` on have no influence and may hold anything finite.
      queries: the pseudo-queries of the block's sites.
      key_scales: their RMSNorm gains; None stands for ones.
      num_valid: completed sources, at least 1.
      eps: added to the mean square of a source.

    Returns:
      Unnormalised numerator [S, *batch, D], running maximum and denominator [S, *batch].
    """
    folded = queries if key_scales is None else queries * key_scales
    return read_bank(bank, reciprocal_rms(bank, eps), folded, num_valid)


def merge(
    state: State,
    partial: Float[Array, "*batch D"],
    query: Float[Array, " D"],
    key_scale: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[Array, "*batch D"]:
    """Phase 2: a site's share of the bank and its block's partial sum under one softmax (Algorithm 1, lines 8-13).

    Args:
      state: the site's part of `inter_block`.
      partial: the running sum of the site's own block; the result has its dtype.
      query: the site's pseudo-query.
      key_scale: its RMSNorm gain; None stands for ones.
      eps: added to the mean square of a source.
    """
    key_scale = jnp.ones_like(query) if key_scale is None else key_scale
    return merge_sources(state, (partial,), depth_logits(partial, query[None], key_scale[None], eps))


def normalise(state: State) -> Float[Array, "*sites_batch D"]:
    """Finishes the softmax of sites that read the bank alone; float32."""
    return state.numerator / state.denominator[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def depth_logits(
    sources: Float[Array, "*batch D"], queries: Float[Array, "S D"], key_scales: Float[Array, "S D"], eps: float
) -> Float[Array, "S *batch"]:
    """The logits queries . (key_scales * RMSNorm(sources)) of every source at S sites, float32 (eq. 2)."""
    return _depth_logits_forward(sources, queries, key_scales, eps)[0]


def _depth_logits_forward(sources, queries, key_scales, eps):
    values, rms = _wide(sources), reciprocal_rms(sources, eps)
    folded = (queries * key_scales).astype(values.dtype)  # only the product enters: w . (g * v) = (w * g) . v
    logits = jnp.moveaxis(jnp.einsum("...d,sd->...s", values, folded, precision=HIGHEST), -1, 0) * rms
    return logits, (sources, queries, key_scales, rms, logits)


def _depth_logits_backward(eps, saved, logits_bar):
    sources, queries, key_scales, rms, logits = saved
    values = _wide(sources)
    folded = (queries * key_scales).astype(values.dtype)
    scaled = logits_bar * rms
    # d logit / d v = rms (w g - v rms logit / D): the second term is the derivative of the normalisation.
    along = jnp.sum(scaled * logits, axis=0) * rms / sources.shape[-1]
    sources_bar = jnp.einsum("s...,sd->...d", scaled, folded, precision=HIGHEST) - along[..., None] * values
    folded_bar = jnp.einsum("s...,...d->sd", scaled, values, precision=HIGHEST)
    return (
        sources_bar.astype(sources.dtype),
        (folded_bar * key_scales).astype(queries.dtype),
        (folded_bar * queries).astype(key_scales.dtype),
    )


depth_logits.defvjp(_depth_logits_forward, _depth_logits_backward)


def reciprocal_rms(sources: Float[Array, "*batch D"], eps: float) -> Float[Array, "*batch"]:
    """1 / sqrt(mean(source^2) + eps), a constant to gradients: `read_bank` accounts for it itself."""
    values = _wide(sources)
    return jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(values * values, axis=-1) + eps))


@jax.custom_vjp
def read_bank(
    values: Float[Array, "N *batch D"],
    rms: Float[Array, "N *batch"],
    folded: Float[Array, "S D"],
    num_valid: int | Int[Array, ""],
) -> State:
    """Phase 1 given the `reciprocal_rms` of the sources and the products `folded` of queries and key scales.

    An online softmax over chunks of the valid slots: the rest of the bank is not read.
    """
    num_valid, maximum = jnp.asarray(num_valid), jnp.full((len(folded), *rms.shape[1:]), -jnp.inf, rms.dtype)

    def add(step, state):
        read = _read_chunk(values, rms, folded, num_valid, step)
        logits = jnp.where(read.mask, read.logits, -jnp.inf)
        maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=0))
        weights, scale = jnp.exp(logits - maximum), jnp.exp(state.maximum - maximum)
        new = sum(weight[..., None] * value for weight, value in zip(weights, read.values, strict=True))
        return State(
            scale[..., None] * state.numerator + new, maximum, scale * state.denominator + jnp.sum(weights, axis=0)
        )

    zeros = jnp.zeros((*maximum.shape, values.shape[-1]), rms.dtype)
    return jax.lax.fori_loop(0, _num_chunks(values, num_valid), add, State(zeros, maximum, jnp.zeros_like(maximum)))


def _read_bank_forward(values, rms, folded, num_valid):
    state = read_bank(values, rms, folded, num_valid)
    return state, (values, rms, folded, num_valid, state.maximum)


def _read_bank_backward(saved, state_bar):
    values, rms, folded, num_valid, maximum = saved
    sites_bar = [state_bar.site(s) for s in range(len(folded))]
    bars = read_bank_transpose(values, rms, folded, num_valid, maximum, sites_bar, jnp.zeros_like(values))
    return bars[0], None, bars[1], None


read_bank.defvjp(_read_bank_forward, _read_bank_backward)


def read_bank_transpose(
    values: Float[Array, "N *batch D"],
    rms: Float[Array, "N *batch"],
    folded: Float[Array, "S D"],
    num_valid: int | Int[Array, ""],
    maximum: Float[Array, "S *batch"],
    sites_bar: Sequence[State],
    values_bar: Float[Array, "N *batch D"],
) -> tuple[Float[Array, "N *batch D"], Float[Array, "S D"]]:
    """The backward pass of `read_bank`, added into `values_bar` in one pass over the valid slots.

    Args:
      values: as in `read_bank`.
      rms: as in `read_bank`.
      folded: as in `read_bank`.
      num_valid: as in `read_bank`.
      maximum: the one that `read_bank` returned.
      sites_bar: the cotangent of each site's state.
      values_bar: what to add to.

    Returns:
      The updated cotangent of the values, and the cotangent of `folded`.
    """
    num_valid = jnp.asarray(num_valid)
    numerators_bar = [site.numerator for site in sites_bar]
    denominator_bar = jnp.stack([site.denominator for site in sites_bar])

    def add(step, carry):
        values_bar, folded_bar = carry
        read = _read_chunk(values, rms, folded, num_valid, step)
        weights = jnp.where(read.mask, jnp.exp(jnp.where(read.mask, read.logits, -jnp.inf) - maximum), 0)
        dots = _dots([(numerator_bar, read.values) for numerator_bar in numerators_bar])
        logits_bar = weights * (jnp.stack(dots, axis=1) + denominator_bar)
        scaled = logits_bar * read.rms[:, None]
        along = jnp.sum(scaled * read.logits, axis=1) * read.rms / values.shape[-1]
        new = -along[..., None] * read.values
        for s, numerator_bar in enumerate(numerators_bar):
            new += weights[:, s, ..., None] * numerator_bar + scaled[:, s, ..., None] * folded[s]
        new = jax.lax.dynamic_slice_in_dim(values_bar, read.start, len(new)) + new.astype(values_bar.dtype)
        folded_bar += jnp.einsum("cs...,c...d->sd", scaled, read.values, precision=HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(values_bar, new, read.start, 0), folded_bar

    return jax.lax.fori_loop(0, _num_chunks(values, num_valid), add, (values_bar, jnp.zeros_like(folded)))


class _Chunk(NamedTuple):
    start: Int[Array, ""]
    values: Float[Array, "C *batch D"]
    rms: Float[Array, "C *batch"]
    logits: Float[Array, "C S *batch"]
    mask: Array  # slots that are valid and that no earlier chunk has read


def _chunk_size(values) -> int:
    """Slots that one step reads. On CPU one: XLA's loops over more ran 2 to 4 times slower. Elsewhere a step per eight
    sources keeps the traffic of the running numerators down."""
    return min(1 if jax.default_backend() == "cpu" else 8, len(values))


def _num_chunks(values, num_valid):
    chunk = _chunk_size(values)
    return (num_valid + chunk - 1) // chunk


def _read_chunk(values, rms, folded, num_valid, step) -> _Chunk:
    chunk = _chunk_size(values)
    start = jnp.minimum(step * chunk, len(values) - chunk)  # the last chunk is moved back so that it ends with the bank
    values = _wide(jax.lax.dynamic_slice_in_dim(values, start, chunk))
    rms = jax.lax.dynamic_slice_in_dim(rms, start, chunk)
    logits = jnp.einsum("c...d,sd->c...s", values, folded.astype(values.dtype), precision=HIGHEST)
    logits = jnp.moveaxis(logits, -1, 1) * rms[:, None]
    slots = (start + jnp.arange(chunk)).reshape((chunk,) + (1,) * (logits.ndim - 1))
    return _Chunk(start, values, rms, logits, (slots >= step * chunk) & (slots < num_valid))


def _dots(pairs):
    """Inner products over the last axis as one variadic reduction, which reads what the pairs share once.

    XLA on CPU runs the einsum half as fast.
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
    inter, weights = _merge_weights(state, logits)
    mixed = inter[..., None] * state.numerator
    mixed += sum(w[..., None] * _wide(s) for w, s in zip(weights, sources, strict=True))
    return mixed.astype(sources[0].dtype), (state, sources, logits)


def _merge_backward(saved, mixed_bar):
    state, sources, logits = saved
    inter, weights = _merge_weights(state, logits)
    mixed_bar = _wide(mixed_bar)
    numerator_dot, *source_dots = _dots([(mixed_bar, x) for x in (state.numerator, *map(_wide, sources))])
    source_dots = jnp.stack(source_dots)
    mean = inter * numerator_dot + jnp.sum(weights * source_dots, axis=0)  # <mixed_bar, mixed>
    state_bar = State(inter[..., None] * mixed_bar, jnp.zeros_like(state.maximum), -inter * mean)
    sources_bar = tuple(
        (w[..., None] * mixed_bar).astype(source.dtype) for w, source in zip(weights, sources, strict=True)
    )
    return state_bar, sources_bar, weights * (source_dots - mean)


def _merge_weights(state, logits):
    """What multiplies the numerator, and the weights of the further sources."""
    maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=0))
    scale, exps = jnp.exp(state.maximum - maximum), jnp.exp(logits - maximum)
    total = scale * state.denominator + jnp.sum(exps, axis=0)
    return scale / total, exps / total


merge_sources.defvjp(_merge_forward, _merge_backward)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
