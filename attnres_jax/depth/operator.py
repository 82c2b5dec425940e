"""The depth-attention operator: a softmax over earlier outputs, whole or in two phases (Attention Residuals, sections 2-4).

A site with query w and key scale g gives source v the logit w . (g * v / rms(v)) and reads the softmax-weighted sum of
the sources themselves: keys are RMS-normalised, values are not, and there is no 1/sqrt(D). The work is cut so that each
source is read as rarely as possible:

    depth_logits    a source against every site that will ever read it: one matmul
    mix_sources     phase 1: the softmax numerators of all the sites of a block, in one read of the bank
    merge           phase 2: one site's numerator and the partial sum of its own block, by online softmax

Statistics, logits and sums are float32 at highest precision even if the sources are bfloat16 (and float64 if they are).
The backward passes are written by hand: they keep their inputs and per-token scalars, never a copy of the sources, and
recompute the rest.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would multiply float32 in bfloat16 passes, GPUs in TF32
CHUNK = 4  # slots of the bank read in one pass over a block's numerators


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
    key_scale = jnp.ones_like(query) if key_scale is None else key_scale
    logits = jnp.swapaxes(depth_logits(sources, query[None], key_scale[None], eps), 0, 1)
    mixed = normalise(mix_sources(sources, logits, sources.shape[0]).site(0)).astype(sources.dtype)
    return (mixed, jax.nn.softmax(logits[:, 0], axis=0)) if return_weights else mixed


def inter_block(
    bank: Float[Array, "N *batch D"],
    queries: Float[Array, "S D"],
    key_scales: Float[Array, "S D"] | None,
    num_valid: int | Int[Array, ""],
    *,
    eps: float = 1e-6,
) -> State:
    """Phase 1: what the S sites of a block take from the completed sources, in one read of the bank (Algorithm 1).

    Args:
      bank: sources; slots from `num_valid` on have no influence and may hold anything finite.
      queries: the pseudo-queries of the block's sites.
      key_scales: their RMSNorm gains; None stands for ones.
      num_valid: completed sources, at least 1.
      eps: added to the mean square of a source.

    Returns:
      Unnormalised numerator [S, *batch, D], running maximum and denominator [S, *batch].
    """
    key_scales = jnp.ones_like(queries) if key_scales is None else key_scales
    return mix_sources(bank, jnp.swapaxes(depth_logits(bank, queries, key_scales, eps), 0, 1), num_valid)


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
    values = _wide(sources)
    rms = jax.lax.rsqrt(jnp.mean(values * values, axis=-1) + eps)
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


@jax.custom_vjp
def mix_sources(
    values: Float[Array, "N *batch D"], logits: Float[Array, "N S *batch"], num_valid: int | Int[Array, ""]
) -> State:
    """Phase 1 from given logits: the numerators of S softmaxes over the first `num_valid` sources."""
    num_valid = jnp.asarray(num_valid)
    maximum, weights = _inter_weights(logits, num_valid)
    chunk = min(CHUNK, values.shape[0])

    def add(step, numerator):
        start, read = _chunk(values, step, chunk)
        weight = jax.lax.dynamic_slice_in_dim(weights, start, chunk) * _unread(step, start, chunk, weights.ndim)
        return numerator + sum(weight[i, ..., None] * _wide(read[i]) for i in range(chunk))

    steps = (num_valid + chunk - 1) // chunk
    numerator = jax.lax.fori_loop(0, steps, add, jnp.zeros(logits.shape[1:] + values.shape[-1:], logits.dtype))
    return State(numerator, maximum, jnp.sum(weights, axis=0))


def _mix_sources_forward(values, logits, num_valid):
    state = mix_sources(values, logits, num_valid)
    return state, (values, logits, num_valid)


def _mix_sources_backward(saved, state_bar):
    values, logits, num_valid = saved
    return *mix_sources_transpose(values, logits, num_valid, state_bar, jnp.zeros_like(values)), None


mix_sources.defvjp(_mix_sources_forward, _mix_sources_backward)


def mix_sources_transpose(
    values: Float[Array, "N *batch D"],
    logits: Float[Array, "N S *batch"],
    num_valid: int | Int[Array, ""],
    state_bar: State,
    values_bar: Float[Array, "N *batch D"],
) -> tuple[Float[Array, "N *batch D"], Float[Array, "N S *batch"]]:
    """The backward pass of `mix_sources`, added into `values_bar`: one read of the bank, one update of its cotangent.

    Returns:
      The updated cotangent of the values, and the cotangent of the logits (zero at slots that are not valid).
    """
    num_valid = jnp.asarray(num_valid)
    _, weights = _inter_weights(logits, num_valid)
    chunk = min(CHUNK, values.shape[0])
    sites = logits.shape[1]

    def add(step, carry):
        values_bar, dots = carry
        start, read = _chunk(values, step, chunk)
        weight = jax.lax.dynamic_slice_in_dim(weights, start, chunk) * _unread(step, start, chunk, weights.ndim)
        numerator_bar = state_bar.numerator
        # One variadic reduction: the chunk is read once for all sites (XLA on CPU runs the einsum 2x slower).
        products = tuple(numerator_bar[s] * _wide(read) for s in range(sites))
        dot = jax.lax.reduce(products, (jnp.zeros((), logits.dtype),) * sites, _add_pairs, (read.ndim - 1,))
        old = jax.lax.dynamic_slice_in_dim(values_bar, start, chunk)
        new = old + sum(weight[:, s, ..., None] * numerator_bar[s] for s in range(sites)).astype(old.dtype)
        return (
            jax.lax.dynamic_update_slice_in_dim(values_bar, new, start, 0),
            jax.lax.dynamic_update_slice_in_dim(dots, jnp.stack(dot, axis=1), start, 0),
        )

    steps = (num_valid + chunk - 1) // chunk
    values_bar, dots = jax.lax.fori_loop(0, steps, add, (values_bar, jnp.zeros_like(logits)))
    return values_bar, weights * (dots + state_bar.denominator)


def _inter_weights(logits, num_valid):
    """Running maximum over the valid slots and exp(logit - maximum), zero elsewhere. Masked before exp."""
    valid = (jnp.arange(logits.shape[0]) < num_valid).reshape((-1,) + (1,) * (logits.ndim - 1))
    masked = jnp.where(valid, logits, -jnp.inf)
    maximum = jnp.max(masked, axis=0)
    return maximum, jnp.exp(masked - maximum)


def _chunk(values, step, chunk):
    """Start and content of a chunk; the last one is moved back so that it ends with the bank."""
    start = jnp.minimum(step * chunk, values.shape[0] - chunk)
    return start, jax.lax.dynamic_slice_in_dim(values, start, chunk)


def _unread(step, start, chunk, ndim):
    """1 for the slots of a chunk that no earlier chunk has read, else 0."""
    return (start + jnp.arange(chunk) >= step * chunk).reshape((chunk,) + (1,) * (ndim - 1))


def _add_pairs(left, right):
    return tuple(a + b for a, b in zip(left, right, strict=True))


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
    numerator_dot = jnp.sum(mixed_bar * state.numerator, axis=-1)
    source_dots = jnp.stack([jnp.sum(mixed_bar * _wide(source), axis=-1) for source in sources])
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
