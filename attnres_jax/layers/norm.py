"""RMSNorm (Zhang and Sennrich, 2019)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean(x^2) + eps): statistics in float32, the result in `dtype`."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(self.dtype)
