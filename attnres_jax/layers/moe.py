"""Mixture of experts as a sublayer: DeepSeek-V3's and Moonlight's, Qwen3's, and Kimi K3's LatentMoE."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnres_jax.axes import HIDDEN, ROW, constrain
from attnres_jax.layers.context import Context
from attnres_jax.layers.expert_exchange import experts_across_devices
from attnres_jax.layers.linear import Linear
from attnres_jax.layers.mlp import GatedMLP
from attnres_jax.layers.norm import RMSNorm
from attnres_jax.layers.router import RouterReport, report, route, router_logits


class MoE(nnx.Module):
    """sum_k w_k expert_k(x) + shared(x) of the normalised input x, the router in float32.

    No token is dropped, unless experts that are spread over devices are given too little room by `capacity`.

    LatentMoE, with a `latent_width`: up(norm(sum_k w_k expert_k(down(x)))) + shared(x). Router and shared experts see x
    itself.

    Args:
      width: D.
      num_experts: E.
      experts_per_token: K.
      expert_width: F, of one expert.
      num_shared: experts that every token takes, unweighted; they are one MLP of so many times the width.
      shared_width: of one of them; None: `expert_width`.
      router_activation: as in `route`, like the next five.
      renormalise: see `route`.
      scaling: see `route`.
      num_groups: see `route`.
      top_groups: see `route`.
      correction_bias: whether the choice has a score correction.
      biased_weights: see `route`.
      latent_width: what the experts read and write; None: the model's width.
      latent_norm: an RMSNorm between the weighted sum and the up projection.
      activation: `silu` or `situ`, of the experts and of the shared ones.
      eps: of the norms.
      dtype: of the norms' results, in which everything but the router and the weighted sum is computed.
      implementation: see `experts`.
      exchange: `way` of `experts_across_devices`.
      capacity: see `experts_across_devices`.
      rngs: for the kernels.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        experts_per_token: int,
        expert_width: int,
        *,
        num_shared: int = 0,
        shared_width: int | None = None,
        router_activation: str = "sigmoid",
        renormalise: bool = True,
        scaling: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        correction_bias: bool = True,
        biased_weights: bool = False,
        latent_width: int | None = None,
        latent_norm: bool = True,
        activation: str = "silu",
        eps: float,
        dtype: str,
        implementation: str = "auto",
        exchange: str = "auto",
        capacity: float = 0.0,
        rngs: nnx.Rngs,
    ):
        inner = latent_width or width
        self.norm = RMSNorm(width, eps, dtype)
        self.router = Linear(width, num_experts, rngs=rngs)
        self.correction_bias = nnx.Param(jnp.zeros(num_experts)) if correction_bias else None
        self.gate = _linears(num_experts, inner, expert_width, rngs)
        self.up = _linears(num_experts, inner, expert_width, rngs)
        self.down = _linears(num_experts, expert_width, inner, rngs)
        shared = num_shared * (shared_width or expert_width)
        self.shared = GatedMLP(width, shared, activation=activation, rngs=rngs) if shared else None
        self.latent_down = Linear(width, inner, rngs=rngs) if latent_width else None
        self.latent_norm = RMSNorm(inner, eps, dtype) if latent_width and latent_norm else None
        self.latent_up = Linear(inner, width, rngs=rngs) if latent_width else None
        self.experts_per_token = experts_per_token
        self.router_activation = router_activation
        self.renormalise = renormalise
        self.scaling = scaling
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.biased_weights = biased_weights
        self.activation = activation
        self.implementation = implementation
        self.exchange = exchange
        self.capacity = capacity

    def __call__(self, h: Float[Array, "B T D"], context: Context | None) -> tuple[Float[Array, "B T D"], RouterReport]:
        """Maps each position on its own; the report leaves out padding, the tokens whose segment id is 0."""
        x = constrain(self.norm(h), *ROW)
        routing = route(
            router_logits(x, self.router.kernel[...]),
            None if self.correction_bias is None else self.correction_bias[...],
            self.experts_per_token,
            activation=self.router_activation,
            renormalise=self.renormalise,
            scaling=self.scaling,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            biased_weights=self.biased_weights,
        )
        z = x if self.latent_down is None else self.latent_down(x)
        segment_ids = None if context is None else context.segment_ids
        valid = None if segment_ids is None else segment_ids > 0
        y, computed = experts_across_devices(
            z,
            routing.indices,
            routing.weights,
            *(linear.kernel[...] for linear in (self.gate, self.up, self.down)),
            valid=valid,
            activation=self.activation,
            implementation=self.implementation,
            way=self.exchange,
            capacity=self.capacity,
        )
        y = constrain(y.astype(z.dtype), *HIDDEN)
        if self.latent_up is not None:
            y = self.latent_up(y if self.latent_norm is None else self.latent_norm(y))
        if self.shared is not None:
            y = y + self.shared(x)
        return constrain(y, *HIDDEN), report(routing, valid, computed)


def _linears(count, inputs, outputs, rngs):
    """`count` linear maps drawn independently, as one whose kernel is [count, inputs, outputs]."""
    return jax.vmap(lambda key: Linear(inputs, outputs, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), count))
