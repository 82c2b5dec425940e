"""What a sublayer computes: f(h, context) -> y, with its pre-norm inside and no residual."""

from attnres_jax.layers.attention import GroupedQueryAttention
from attnres_jax.layers.context import Context, make_context
from attnres_jax.layers.embedding import Embedding
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.mla import MLA, MLACache
from attnres_jax.layers.mlp import GatedMLP, SwiGLU
from attnres_jax.layers.moe import MoE
from attnres_jax.layers.norm import RMSNorm
from attnres_jax.layers.rotary import Llama3Scaling, YarnScaling
from attnres_jax.layers.router import RouterReport, update_bias

__all__ = [
    "MLA",
    "Context",
    "Embedding",
    "GatedMLP",
    "GroupedQueryAttention",
    "Linear",
    "Llama3Scaling",
    "MLACache",
    "MoE",
    "RMSNorm",
    "RouterReport",
    "SwiGLU",
    "YarnScaling",
    "make_context",
    "update_bias",
]
