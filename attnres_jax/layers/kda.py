"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3), and its gates in Kimi K3 (arXiv 2607.24653)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from attnres_jax.axes import HIDDEN, constrain, mesh_axes_of, per_shard
from attnres_jax.layers.context import Context
from attnres_jax.layers.convolution import ShortConvolution
from attnres_jax.layers.delta_chunks import delta_rule_chunkwise
from attnres_jax.layers.delta_rule import delta_rule_step
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.norm import RMSNorm

L2_EPS = 1e-6  # added to the squared length of queries and keys


class KDAState(NamedTuple):
    """What decoding goes on from; its size does not depend on how many tokens came before."""

    query_inputs: Float[Array, "B before channels"]
    key_inputs: Float[Array, "B before channels"]
    value_inputs: Float[Array, "B before channels"]
    memory: Float[Array, "B H K V"]
    """float32"""


class KDA(nnx.Module):
    """Linear attention by a gated delta rule with a decay per key channel; V = K = `head_dim`.

    Queries, keys and values pass a short convolution, queries and keys are then L2-normalised. Of
    a = decay_up(decay_down(x)) the log decay is -exp(log_rate) softplus(a + decay_bias) without a `gate_lower_bound`
    (Kimi Linear), and gate_lower_bound * sigmoid(exp(log_rate) (a + decay_bias)) with one (K3: -5). What a head reads
    is RMS-normalised and multiplied with the sigmoid of gate(x), or of the low-rank gate_up(gate_down(x)). Gates,
    norms and state are float32.

    Where the sequence is split over devices it is put together first, and devices that differ in nothing but their part
    of it all compute the whole row: states pass along the row, and passing them from device to device would leave all
    but one waiting. Heads are split.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        conv_size: int,
        gate_lower_bound: float | None,
        full_rank_gate: bool,
        eps: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        channels = num_heads * head_dim
        self.norm = RMSNorm(width, eps, dtype)
        self.query = Linear(width, channels, rngs=rngs)
        self.key = Linear(width, channels, rngs=rngs)
        self.value = Linear(width, channels, rngs=rngs)
        self.query_conv = ShortConvolution(channels, conv_size, rngs=rngs)
        self.key_conv = ShortConvolution(channels, conv_size, rngs=rngs)
        self.value_conv = ShortConvolution(channels, conv_size, rngs=rngs)
        self.decay_down = Linear(width, head_dim, rngs=rngs)
        self.decay_up = Linear(head_dim, channels, rngs=rngs)
        self.beta = Linear(width, num_heads, rngs=rngs)
        self.gate = Linear(width, channels, rngs=rngs) if full_rank_gate else None
        self.gate_down = None if full_rank_gate else Linear(width, head_dim, rngs=rngs)
        self.gate_up = None if full_rank_gate else Linear(head_dim, channels, rngs=rngs)
        rate = jax.random.uniform(rngs.params(), num_heads, minval=1.0, maxval=16.0)
        self.log_rate = nnx.Param(jnp.log(rate) if gate_lower_bound is None else jnp.zeros(num_heads))
        self.decay_bias = nnx.Param(_inverse_softplus(_time_steps(rngs.params(), channels)))
        self.out_norm = RMSNorm(head_dim, eps, "float32")
        self.out = Linear(channels, width, rngs=rngs)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.gate_lower_bound = gate_lower_bound
        self.dtype = dtype

    def __call__(self, h: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Reads within the row's documents."""
        return constrain(self._run(h, self.init_state(len(h)), context.segment_ids)[0], *HIDDEN)

    def prefill(
        self, h: Float[Array, "B T D"], state: KDAState | None = None
    ) -> tuple[Float[Array, "B T D"], KDAState]:
        """A row of any length that goes on after `state` (None: a document's start), and the state after it."""
        return self._run(h, self.init_state(len(h)) if state is None else state, None)

    def step(self, h: Float[Array, "B D"], state: KDAState) -> tuple[Float[Array, "B D"], KDAState]:
        """One token of each row."""
        x = self.norm(h)
        inputs = zip((self.query, self.key, self.value), self._convolutions(), state[:3], strict=True)
        (q, *q_inputs), (k, *k_inputs), (v, *v_inputs) = (conv.step(linear(x), past) for linear, conv, past in inputs)
        read, memory = delta_rule_step(*self._qkv(q, k, v), self.log_decay(x), self._beta(x), state.memory)
        return self._output(read, x), KDAState(*q_inputs, *k_inputs, *v_inputs, memory)

    def init_state(self, batch: int) -> KDAState:
        """The state at a document's start."""
        past = (conv.init_state(batch, self.dtype) for conv in self._convolutions())
        return KDAState(*past, jnp.zeros((batch, self.num_heads, self.head_dim, self.head_dim), jnp.float32))

    def log_decay(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch H K"]:
        """The log of what each key channel keeps, float32, of the normalised input."""
        logits = self.decay_up(self.decay_down(x)).astype(jnp.float32) + self.decay_bias[...]
        logits = logits.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))[:, None]
        if self.gate_lower_bound is None:
            return -rate * jax.nn.softplus(logits)
        return self.gate_lower_bound * jax.nn.sigmoid(rate * logits)

    def _run(self, h, state: KDAState, segment_ids: Int[Array, "B T"] | None):
        x = constrain(self.norm(h), "batch", None, None)
        segment_ids = None if segment_ids is None else constrain(segment_ids, "batch", None)
        inputs = zip((self.query, self.key, self.value), self._convolutions(), state[:3], strict=True)
        (q, *q_inputs), (k, *k_inputs), (v, *v_inputs) = (
            conv(constrain(linear(x), "batch", None, "heads"), past, segment_ids) for linear, conv, past in inputs
        )
        read, memory = delta_rule_by_shard(
            *self._qkv(q, k, v), self.log_decay(x), self._beta(x), state.memory, segment_ids, self.gate_lower_bound
        )
        return self._output(read, x), KDAState(*q_inputs, *k_inputs, *v_inputs, memory)

    def _convolutions(self) -> tuple[ShortConvolution, ...]:
        return self.query_conv, self.key_conv, self.value_conv

    def _qkv(self, q, k, v):
        """By heads, queries and keys L2-normalised in float32 and rounded to the dtype of the layer."""
        q, k, v = (y.reshape(*y.shape[:-1], self.num_heads, self.head_dim) for y in (q, k, v))
        return _l2_normalise(q), _l2_normalise(k), v

    def _beta(self, x):
        return jax.nn.sigmoid(self.beta(x).astype(jnp.float32))

    def _output(self, read, x):
        logits = self.gate(x) if self.gate is not None else self.gate_up(self.gate_down(x))
        gate = jax.nn.sigmoid(logits.astype(jnp.float32)).reshape(read.shape)
        return self.out((self.out_norm(read) * gate).astype(self.dtype).reshape(*x.shape[:-1], -1))


def delta_rule_by_shard(q, k, v, log_decay, beta, state, segment_ids, lower_bound):
    """`delta_rule_chunkwise` of each device's own rows and heads, which have nothing to do with each other's."""
    axes = mesh_axes_of(batch=q.shape[0], heads=q.shape[2])
    form = functools.partial(delta_rule_chunkwise, lower_bound=lower_bound)
    if not axes:
        return form(q, k, v, log_decay, beta, state, segment_ids)
    row, state_spec = P(axes["batch"], None, axes["heads"]), P(axes["batch"], axes["heads"])
    ins = [row] * 5 + [state_spec] + ([] if segment_ids is None else [P(axes["batch"])])
    arrays = (q, k, v, log_decay, beta, state) + (() if segment_ids is None else (segment_ids,))
    return per_shard(form, ins, (row, state_spec))(*arrays)


def _l2_normalise(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + L2_EPS)).astype(x.dtype)


def _time_steps(key: jax.Array, channels: int) -> Float[Array, " channels"]:
    """Log-uniform between 0.001 and 0.1, as flash-linear-attention draws them: a bias of slow decays."""
    return jnp.exp(jax.random.uniform(key, channels, minval=math.log(1e-3), maxval=math.log(1e-1)))


def _inverse_softplus(x: Array) -> Array:
    return x + jnp.log(-jnp.expm1(-x))
