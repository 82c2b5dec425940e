"""Grouped-query attention (Ainslie et al., 2023) with rotary embedding and optional q/k norm."""

from flax import nnx
from jaxtyping import Array, Float

from attnres_jax.axes import HIDDEN, ROW, constrain
from attnres_jax.layers.context import Context
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.norm import RMSNorm
from attnres_jax.layers.rotary import rotate
from attnres_jax.layers.softmax_attention import attend, implementation_for


class GroupedQueryAttention(nnx.Module):
    """Causal self-attention; `num_kv_heads` key and value heads serve `num_heads` query heads.

    Where the sequence is split over devices, each has its own queries and the keys and values of all tokens.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        eps: float,
        dtype: str,
        implementation: str,
        rngs: nnx.Rngs,
    ):
        self.norm = RMSNorm(width, eps, dtype)
        self.query = Linear(width, num_heads * head_dim, rngs=rngs)
        self.key = Linear(width, num_kv_heads * head_dim, rngs=rngs)
        self.value = Linear(width, num_kv_heads * head_dim, rngs=rngs)
        self.out = Linear(num_heads * head_dim, width, rngs=rngs)
        self.query_norm = RMSNorm(head_dim, eps, dtype) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, eps, dtype) if qk_norm else None
        self.head_dim = head_dim
        self.implementation = implementation

    def __call__(self, h: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """Attends within the row's documents."""
        x = constrain(self.norm(h), *ROW)
        query, key, value = (
            y.reshape(*y.shape[:2], -1, self.head_dim) for y in (self.query(x), self.key(x), self.value(x))
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, context.cos, context.sin), rotate(key, context.cos, context.sin)
        query = constrain(query, "batch", "length", "heads", None)
        key, value = (constrain(y, "batch", None, "heads", None) for y in (key, value))
        y = attend(query, key, value, context, implementation=implementation_for(self.implementation, query))
        return constrain(self.out(constrain(y.reshape(*y.shape[:2], -1), "batch", "length", "heads")), *HIDDEN)
