"""What a sublayer computes: f(h, context) -> y, with its pre-norm inside and no residual."""

from attnres_jax.layers.attention import GroupedQueryAttention
from attnres_jax.layers.context import Context, make_context
from attnres_jax.layers.embedding import Embedding
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.mlp import SwiGLU
from attnres_jax.layers.norm import RMSNorm

__all__ = ["Context", "Embedding", "GroupedQueryAttention", "Linear", "RMSNorm", "SwiGLU", "make_context"]
