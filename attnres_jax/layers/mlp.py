"""The SwiGLU feed-forward layer (Shazeer, 2020)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnres_jax.layers.context import Context
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.norm import RMSNorm


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) of the normalised input."""

    def __init__(self, width: int, hidden: int, *, eps: float, dtype: str, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, eps, dtype)
        self.gate = Linear(width, hidden, rngs=rngs)
        self.up = Linear(width, hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)

    def __call__(self, h: Float[Array, "*batch D"], context: Context | None) -> Float[Array, "*batch D"]:
        """Maps each position on its own."""
        x = self.norm(h)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
