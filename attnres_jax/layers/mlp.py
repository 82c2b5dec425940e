"""Gated feed-forward layers: SwiGLU (Shazeer, 2020), and its bounded kind SiTU-GLU (Kimi K3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnres_jax.axes import HIDDEN, ROW, constrain
from attnres_jax.layers.context import Context
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.norm import RMSNorm


def silu_gate(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


def situ_gate(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], beta: float = 4.0, linear_beta: float = 25.0
) -> Float[Array, "*batch F"]:
    """SiTU-GLU: silu and up, each bounded by a tanh, at `beta` and at `linear_beta`; float32 inside (Kimi K3)."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    left, right = gate.astype(wide), up.astype(wide)
    bounded = beta * jnp.tanh(left / beta) * jax.nn.sigmoid(left)
    return (bounded * linear_beta * jnp.tanh(right / linear_beta)).astype(gate.dtype)


GATES: dict[str, Callable] = {"silu": silu_gate, "situ": situ_gate}


class GatedMLP(nnx.Module):
    """down(act(gate(x), up(x))), without a norm; `activation` is a key of `GATES`."""

    def __init__(self, width: int, hidden: int, *, activation: str = "silu", rngs: nnx.Rngs):
        self.gate = Linear(width, hidden, rngs=rngs)
        self.up = Linear(width, hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Maps each position on its own."""
        x = constrain(x, *ROW)
        hidden = GATES[self.activation](self.gate(x), self.up(x))
        return constrain(self.down(constrain(hidden, "batch", "length", "mlp")), *HIDDEN)


class SwiGLU(GatedMLP):
    """The gated MLP as a sublayer: of the normalised input. SwiGLU proper with the activation `silu`."""

    def __init__(self, width: int, hidden: int, *, eps: float, dtype: str, activation: str = "silu", rngs: nnx.Rngs):
        self.norm = RMSNorm(width, eps, dtype)
        super().__init__(width, hidden, activation=activation, rngs=rngs)

    def __call__(self, h: Float[Array, "*batch D"], context: Context | None) -> Float[Array, "*batch D"]:
        """Maps each position on its own."""
        return super().__call__(self.norm(h))
