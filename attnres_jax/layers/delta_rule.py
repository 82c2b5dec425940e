"""The gated delta rule of Kimi Delta Attention, token by token (Kimi Linear, eq. 1): definition and decoding.

A head keeps a matrix S [K, V] that maps keys to values. Each token lets every key channel of it fade, then corrects
what the matrix answers to the token's key, then reads it with the token's query:

    S~_t = Diag(exp(g_t)) S_{t-1}
    S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T
    o_t  = S_t^T q_t / sqrt(K)

g is the log decay, zero or less for every channel, -inf to forget. The state is float32 whatever the inputs' dtype (and
float64 if they are). `delta_chunks` computes the same in chunks of tokens.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST  # TPUs would multiply float32 in bfloat16 passes, GPUs in TF32


def delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    log_decay: Float[Array, "B H K"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token: what it reads, in the dtype of `v`, and the state after it.

    Args:
      q: query; the scale 1 / sqrt(K) is applied here.
      k: key, of length 1 or less for a stable rule.
      v: value.
      log_decay: log of what each key channel of the state keeps, <= 0.
      beta: how far the state's answer to `k` is moved towards `v`, in [0, 1].
      state: the state before the token.
    """
    q, k, value = (x.astype(state.dtype) for x in (q, k, v))
    faded = jnp.exp(log_decay.astype(state.dtype))[..., None] * state
    error = value - jnp.einsum("bhkv,bhk->bhv", faded, k, precision=HIGHEST)
    state = faded + (beta.astype(state.dtype)[..., None] * k)[..., None] * error[..., None, :]
    read = jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST) / math.sqrt(q.shape[-1])
    return read.astype(v.dtype), state


def delta_rule_recurrence(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A scan of `delta_rule_step` over the row: the reference. Arguments as of `delta_rule_chunkwise`."""
    if segment_ids is not None:
        log_decay = at_starts(document_starts(segment_ids), log_decay, -jnp.inf)
    state = start_state(v, log_decay, initial_state)

    def token(state, inputs):
        read, state = delta_rule_step(*inputs, state)
        return state, read

    state, read = jax.lax.scan(token, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta)))
    return jnp.moveaxis(read, 0, 1), state


def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a document begins within the row: a document is a run of equal ids. Never at a row's first token, which
    goes on with whatever state the row is given."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(starts, ((0, 0), (1, 0)))


def at_starts(
    starts: Bool[Array, "B T"] | None, log_decay: Float[Array, "B T H K"], value: float
) -> Float[Array, "B T H K"]:
    """The log decay with `value` where a document begins. -inf keeps nothing.

    Exact, and of no harm to its neighbours, as long as log decays are only ever added and never subtracted.
    """
    return log_decay if starts is None else jnp.where(starts[..., None, None], value, log_decay)


def start_state(
    v: Float[Array, "B T H V"], log_decay: Float[Array, "B T H K"], initial_state: Float[Array, "B H K V"] | None
) -> Float[Array, "B H K V"]:
    """The given state or zeros, at least float32."""
    dtype = jnp.result_type(v.dtype, log_decay.dtype, jnp.float32)
    if initial_state is not None:
        return initial_state.astype(dtype)
    batch, _, heads, values = v.shape
    return jnp.zeros((batch, heads, log_decay.shape[-1], values), dtype)
