"""Multi-head latent attention (DeepSeek-V2, section 2.1), with or without rotation, as DeepSeek, Kimi Linear and K3 do.

Keys and values of all heads come from one latent vector a token, and all heads share one further part of the key: the
only part that is rotated, if any is. Two forms of the same function:

    full        keys and values of each head expanded from the latents: multi-head attention, for training and prefill
    absorbed    the expansion moved to the query and to the output: one key and value head as wide as the latent, for
                decoding. A cache keeps `latent_dim + rope_dim` numbers a token, whatever the number of heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.axes import HIDDEN, ROW, constrain
from attnres_jax.layers.context import Context
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.norm import RMSNorm
from attnres_jax.layers.rotary import rotate
from attnres_jax.layers.softmax_attention import attend, implementation_for


class MLACache(NamedTuple):
    """What decoding keeps of S places a row; those from `length` on have no influence."""

    latent: Float[Array, "B S R"]
    """Normalised."""
    shared_key: Float[Array, "B S P"]
    """Rotated, if the layer rotates."""
    segment_ids: Int[Array, "B S"]
    length: Int[Array, " B"]


class MLA(nnx.Module):
    """Causal self-attention through a latent; the softmax scale is (nope_dim + rope_dim)^-1/2 * scale_multiplier.

    Where the sequence is split over devices, each has its own queries and the latents of all tokens.

    Args:
      width: D.
      num_heads: H.
      latent_dim: R, of the vector that keys and values come from (`kv_lora_rank`).
      nope_dim: of a head's key that comes from the latent, never rotated.
      rope_dim: P, of the key part that the heads share, rotated or not.
      value_dim: of a head's value.
      query_rank: of the low-rank query projection, with a norm inside (`q_lora_rank`); None: one full projection.
      rotary: rotate the shared part, by the context's tables, which must be for a head width of `rope_dim`.
      rotary_interleaved: pair neighbours and not halves, as DeepSeek's checkpoints do.
      output_gate: multiply the heads' outputs with sigmoid(gate(x)) (K3).
      eps: of the pre-norm.
      latent_eps: of the norms of the latent and of the low-rank query: a class default at Hugging Face.
      scale_multiplier: for a context extended by YaRN: `YarnScaling.softmax_multiplier`.
      dtype: what the norms return, and everything is computed in; the softmax is float32.
      implementation: of the full form's softmax: auto, splash, or anything else for XLA's, see `softmax_attention`.
      rngs: for the kernels.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        latent_dim: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        query_rank: int | None = None,
        rotary: bool = False,
        rotary_interleaved: bool = False,
        output_gate: bool = False,
        eps: float,
        latent_eps: float = 1e-6,
        scale_multiplier: float = 1.0,
        dtype: str,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        queries = num_heads * (nope_dim + rope_dim)
        self.norm = RMSNorm(width, eps, dtype)
        self.query = Linear(width, queries, rngs=rngs) if query_rank is None else None
        self.query_down = None if query_rank is None else Linear(width, query_rank, rngs=rngs)
        self.query_norm = None if query_rank is None else RMSNorm(query_rank, latent_eps, dtype)
        self.query_up = None if query_rank is None else Linear(query_rank, queries, rngs=rngs)
        self.latent = Linear(width, latent_dim + rope_dim, rngs=rngs)
        self.latent_norm = RMSNorm(latent_dim, latent_eps, dtype)
        self.expand = Linear(latent_dim, num_heads * (nope_dim + value_dim), rngs=rngs)
        self.gate = Linear(width, num_heads * value_dim, rngs=rngs) if output_gate else None
        self.out = Linear(num_heads * value_dim, width, rngs=rngs)
        self.num_heads = num_heads
        self.latent_dim = latent_dim
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        self.rotary = rotary
        self.rotary_interleaved = rotary_interleaved
        self.scale = (nope_dim + rope_dim) ** -0.5 * scale_multiplier
        self.dtype = dtype
        self.implementation = implementation

    def __call__(self, h: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Attends within the row's documents; the full form."""
        return constrain(self._full(constrain(self.norm(h), *ROW), context)[0], *HIDDEN)

    def empty_cache(self, batch: int, capacity: int) -> MLACache:
        """A cache with nothing in it and `capacity` places a row."""
        return MLACache(
            jnp.zeros((batch, capacity, self.latent_dim), self.dtype),
            jnp.zeros((batch, capacity, self.rope_dim), self.dtype),
            jnp.zeros((batch, capacity), jnp.int32),
            jnp.zeros(batch, jnp.int32),
        )

    def prefill(
        self, h: Float[Array, "B T D"], context: Context, capacity: int, lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], MLACache]:
        """The full form, and a cache of `capacity` places that holds its T tokens.

        Args:
          h: the prompts, padded on the right.
          context: as in a call.
          capacity: at least T.
          lengths: of each prompt; what follows it is overwritten. None: T.

        Raises:
          ValueError: if the cache cannot hold the prompts.
        """
        if h.shape[1] > capacity:
            raise ValueError(f"a cache of {capacity} places cannot hold a prompt of {h.shape[1]} tokens")
        y, latent, shared_key = self._full(self.norm(h), context)
        cache = _append(self.empty_cache(len(h), capacity), latent, shared_key, _segments(context, h))
        return y, cache if lengths is None else cache._replace(length=lengths)

    def step(
        self, h: Float[Array, "B T D"], context: Context, cache: MLACache
    ) -> tuple[Float[Array, "B T D"], MLACache]:
        """The next T tokens of every row, usually one; the absorbed form.

        Args:
          h: the tokens' hidden states; together with what is in the cache they must fit into it.
          context: of these tokens alone: their positions and segment ids (None: 1). Its mask is not read.
          cache: of what was before them.

        Returns:
          The output, and the cache with the tokens in it.
        """
        x = self.norm(h)
        (query, shared_query), (latent, shared_key) = self._queries(x, context), self._latents(x, context)
        place = cache.length[:, None] + jnp.arange(h.shape[1])
        segment_ids = _segments(context, h)
        cache = _append(cache, latent, shared_key, segment_ids)
        seen = jnp.arange(cache.latent.shape[1]) <= place[..., None]
        seen &= cache.segment_ids[:, None] == segment_ids[..., None]
        key_part, value_part = self._expansion(x.dtype)
        query = jnp.einsum("bthk,rhk->bthr", query, key_part)
        scores = jnp.einsum("bthr,bsr->bhts", query, cache.latent, preferred_element_type=jnp.float32)
        weights = self._softmax(scores, shared_query, cache.shared_key, seen[:, None]).astype(x.dtype)
        y = jnp.einsum("bhts,bsr->bthr", weights, cache.latent)
        return self._out(jnp.einsum("bthr,rhv->bthv", y, value_part), x), cache

    def _full(self, x, context):
        (query, shared_query), (latent, shared_key) = self._queries(x, context), self._latents(x, context)
        query, shared_query = (constrain(y, "batch", "length", "heads", None) for y in (query, shared_query))
        latent, shared_key = (constrain(y, "batch", None, None) for y in (latent, shared_key))
        expanded = self.expand(latent).reshape(*x.shape[:2], self.num_heads, -1)
        key, value = expanded[..., : self.nope_dim], expanded[..., self.nope_dim :]
        if self.implementation != "cudnn" and implementation_for(self.implementation, query) == "splash":
            query = jnp.concatenate([query, shared_query], -1)
            shared = jnp.broadcast_to(shared_key[:, :, None], (*key.shape[:-1], self.rope_dim))
            key = jnp.concatenate([key, shared], -1)
            y = attend(query, key, value, context, implementation="splash", scale=self.scale)
        else:
            y = self._attend_by_parts(query, shared_query, key, shared_key, value, context)
        y = constrain(y, "batch", "length", "heads", None)
        return self._out(y, x), latent, shared_key

    def _attend_by_parts(self, query, shared_query, key, shared_key, value, context):
        """The shared part enters as a product of its own: no copy of it for every head."""
        seen = jnp.tril(jnp.ones((query.shape[1], query.shape[1]), bool))
        seen = seen if context.same_document is None else seen & context.same_document
        scores = jnp.einsum("bthk,bshk->bhts", query, key, preferred_element_type=jnp.float32)
        weights = self._softmax(scores, shared_query, shared_key, seen).astype(query.dtype)
        return jnp.einsum("bhts,bshv->bthv", weights, value)

    def _queries(self, x, context):
        """[B, T, H, nope_dim] and [B, T, H, rope_dim]."""
        query = self.query_up(self.query_norm(self.query_down(x))) if self.query is None else self.query(x)
        query = query.reshape(*x.shape[:2], self.num_heads, -1)
        return query[..., : self.nope_dim], self._rotated(query[..., self.nope_dim :], context)

    def _latents(self, x, context):
        """[B, T, latent_dim], normalised, and the shared part of the key [B, T, rope_dim]."""
        both = self.latent(x)
        shared_key = self._rotated(both[:, :, None, self.latent_dim :], context)[:, :, 0]
        return self.latent_norm(both[..., : self.latent_dim]), shared_key

    def _rotated(self, x, context):
        if not self.rotary:
            return x
        if 2 * context.cos.shape[-1] != self.rope_dim:
            raise ValueError(
                f"rotary tables for a head width of {2 * context.cos.shape[-1]} cannot rotate "
                f"rope_dim={self.rope_dim}; make the context with head_dim={self.rope_dim}"
            )
        return rotate(x, context.cos, context.sin, interleaved=self.rotary_interleaved)

    def _softmax(self, scores, shared_query, shared_key, seen):
        """Float32 weights from the scores of the heads' own parts, to which the shared part is added."""
        scores += jnp.einsum("bthp,bsp->bhts", shared_query, shared_key, preferred_element_type=jnp.float32)
        # Finite, so that no gradient is NaN; every token sees itself.
        return jax.nn.softmax(jnp.where(seen, self.scale * scores, jnp.finfo(scores.dtype).min), axis=-1)

    def _expansion(self, dtype):
        """What makes a head's key of a latent, [R, H, nope_dim], and its value, [R, H, value_dim]."""
        kernel = self.expand.kernel[...].astype(dtype).reshape(self.latent_dim, self.num_heads, -1)
        return kernel[..., : self.nope_dim], kernel[..., self.nope_dim :]

    def _out(self, y, x):
        y = y.reshape(*y.shape[:2], -1)
        return self.out(y if self.gate is None else y * jax.nn.sigmoid(self.gate(x)))


def _segments(context, h):
    return jnp.ones(h.shape[:2], jnp.int32) if context.segment_ids is None else context.segment_ids


def _append(cache, latent, shared_key, segment_ids):
    """Each row's tokens from its own length on."""
    put = jax.vmap(lambda places, new, start: jax.lax.dynamic_update_slice_in_dim(places, new, start, 0))
    return MLACache(
        *(
            put(places, new.astype(places.dtype), cache.length)
            for places, new in zip(cache[:3], (latent, shared_key, segment_ids), strict=True)
        ),
        cache.length + latent.shape[1],
    )
