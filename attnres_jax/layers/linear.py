"""Linear maps without bias; the parameter is float32, the arithmetic in the input's dtype."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """y = x W, with W drawn from a truncated normal of variance 1 / inputs."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        # 0.87962566 is the standard deviation of a unit normal truncated at 2.
        scale = 1 / math.sqrt(inputs) / 0.87962566103423978
        self.kernel = nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -2, 2, (inputs, outputs)))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Multiplies in the dtype of `x`."""
        return x @ self.kernel[...].astype(x.dtype)
