"""What a sublayer computes: f(h, context) -> y, with its pre-norm inside and no residual."""

from attnres_jax.layers.attention import GroupedQueryAttention
from attnres_jax.layers.context import Context, make_context
from attnres_jax.layers.delta_chunks import delta_rule_chunkwise
from attnres_jax.layers.delta_rule import delta_rule_recurrence, delta_rule_step
from attnres_jax.layers.embedding import Embedding
from attnres_jax.layers.kda import KDA, KDAState
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.mla import MLA, MLACache
from attnres_jax.layers.mlp import GatedMLP, SwiGLU
from attnres_jax.layers.moe import MoE
from attnres_jax.layers.norm import RMSNorm
from attnres_jax.layers.rotary import Llama3Scaling, YarnScaling
from attnres_jax.layers.router import RouterReport, update_bias

__all__ = [
    "KDA",
    "MLA",
    "Context",
    "Embedding",
    "GatedMLP",
    "GroupedQueryAttention",
    "KDAState",
    "Linear",
    "Llama3Scaling",
    "MLACache",
    "MoE",
    "RMSNorm",
    "RouterReport",
    "SwiGLU",
    "YarnScaling",
    "delta_rule_chunkwise",
    "delta_rule_recurrence",
    "delta_rule_step",
    "make_context",
    "update_bias",
]
