"""Which experts a token takes, with what weights, and how their load is kept even; pure functions on arrays.

Scores and logits are float32 whatever the model's dtype. Balance comes from a bias that is added to the scores for the
choice alone and follows the load by a sign rule, outside of the gradient (Wang et al., 2024; DeepSeek-V3, section
2.1.2; Moonlight, appendix C). The two losses are unscaled: what they weigh is the caller's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}


class Routing(NamedTuple):
    """The choice for every token."""

    indices: Int[Array, "*batch K"]
    weights: Float[Array, "*batch K"]
    scores: Float[Array, "*batch E"]
    logits: Float[Array, "*batch E"]


class RouterReport(NamedTuple):
    """What a mixture-of-experts layer reports of a batch, float32; padding counts nowhere."""

    load: Float[Array, " E"]
    """Each expert's share of the assignments; adds up to one."""
    balance_loss: Float[Array, ""]
    """`sequence_balance_loss`, 1 at an even load."""
    z_loss: Float[Array, ""]
    """`router_z_loss`."""
    max_violation: Float[Array, ""]
    """How far the busiest expert is above an even share, as a part of it: 0 is even, E - 1 is everything on one."""
    idle: Float[Array, ""]
    """The share of experts with no token at all."""
    dropped: Float[Array, ""]
    """The share of assignments that no expert computed."""
    tokens: Float[Array, ""]
    """How many tokens the above are of: what to weigh with in a mean over batches."""


def router_logits(x: Float[Array, "*batch D"], kernel: Float[Array, "D E"]) -> Float[Array, "*batch E"]:
    """x kernel, both cast to float32 and multiplied at highest precision."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(wide), kernel.astype(wide), precision=jax.lax.Precision.HIGHEST)


def route(
    logits: Float[Array, "*batch E"],
    bias: Float[Array, " E"] | None,
    experts_per_token: int,
    *,
    activation: str = "sigmoid",
    renormalise: bool = True,
    scaling: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    biased_weights: bool = False,
) -> Routing:
    """The experts of every token and their weights (DeepSeek-V3, eqs. 12-16).

    Args:
      logits: of the router, float32.
      bias: the score correction, added to the scores for the choice; no gradient reaches it. None: no correction.
      experts_per_token: K.
      activation: `sigmoid`, or `softmax` over the experts.
      renormalise: divide the K weights by their sum.
      scaling: what the weights are multiplied with at last.
      num_groups: experts stand in this many groups of equal size, and a token chooses within a few of them.
      top_groups: how many: those whose two best biased scores have the largest sum.
      biased_weights: the weights too are of the biased scores, as in Kimi Linear's remote code at Hugging Face, which
        adds the bias in place. Reports and other implementations read the plain scores.

    Raises:
      ValueError: if the groups do not divide the experts, or the chosen groups have too few of them.
    """
    scores = SCORES[activation](logits)
    biased = scores if bias is None else scores + jax.lax.stop_gradient(bias)
    open_to_choice = _within_groups(jax.lax.stop_gradient(biased), experts_per_token, num_groups, top_groups)
    indices = jax.lax.top_k(open_to_choice, experts_per_token)[1]
    weights = jnp.take_along_axis(biased if biased_weights else scores, indices, axis=-1)
    if renormalise:
        weights = _shares(weights)
    return Routing(indices, scaling * weights, scores, logits)


def _shares(scores):
    """Each score as a part of its token's sum.

    Sigmoids may all underflow; the square of what is added to their sum, by which a gradient divides, does not.
    """
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-18)


def _within_groups(biased, experts_per_token, num_groups, top_groups):
    """The biased scores, minus infinity outside of each token's best groups."""
    size, rest = divmod(biased.shape[-1], num_groups)
    if rest or not 0 < top_groups <= num_groups or top_groups * size < experts_per_token:
        raise ValueError(
            f"{experts_per_token} of {biased.shape[-1]} experts cannot be chosen within {top_groups} of {num_groups} "
            "groups: groups divide the experts, and those chosen hold enough of them"
        )
    if num_groups == top_groups:
        return biased
    grouped = biased.reshape(*biased.shape[:-1], num_groups, size)
    best = jnp.sum(jax.lax.top_k(grouped, min(2, size))[0], axis=-1)
    chosen = jax.lax.top_k(best, top_groups)[1]
    kept = jnp.any(chosen[..., None] == jnp.arange(num_groups), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def assignments(
    indices: Int[Array, "B T K"], num_experts: int, valid: Bool[Array, "B T"] | None = None
) -> Float[Array, "B E"]:
    """How many of a row's valid tokens chose each expert; None: all are valid."""
    hits = indices[..., None] == jnp.arange(num_experts)
    if valid is not None:
        hits &= valid[..., None, None]
    return jnp.sum(hits, axis=(1, 2), dtype=jnp.float32)


def sequence_balance_loss(
    scores: Float[Array, "B T E"], indices: Int[Array, "B T K"], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """sum_e f_e P_e of every row, and the mean over rows that have a token (DeepSeek-V3, eqs. 17-20, without alpha).

    f_e is E / K times the fraction of the row's tokens that chose expert e, and P_e the mean of its score as a part of
    the token's sum of scores. The gradient is that of P.
    """
    num_experts, experts_per_token = scores.shape[-1], indices.shape[-1]
    tokens = _tokens(valid, indices.shape[:2])
    shares = _shares(scores)
    if valid is not None:
        shares = jnp.where(valid[..., None], shares, 0)
    each = jnp.maximum(tokens, 1)[:, None]
    fractions = assignments(indices, num_experts, valid) * (num_experts / experts_per_token) / each
    losses = jnp.sum(fractions * jnp.sum(shares, axis=1) / each, axis=-1)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(tokens > 0), 1)


def router_z_loss(logits: Float[Array, "B T E"], valid: Bool[Array, "B T"] | None = None) -> Float[Array, ""]:
    """The mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5), which keeps logits small."""
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    if valid is not None:
        squares = jnp.where(valid, squares, 0)
    return jnp.sum(squares) / jnp.maximum(jnp.sum(_tokens(valid, logits.shape[:2])), 1)


def report(
    routing: Routing, valid: Bool[Array, "B T"] | None = None, computed: Int[Array, ""] | None = None
) -> RouterReport:
    """Losses and load statistics of a batch whose arrays have axes B and T.

    Args:
      routing: of the batch.
      valid: leaves padding out.
      computed: how many assignments of valid tokens an expert computed; None: all.
    """
    num_experts = routing.scores.shape[-1]
    counts = jnp.sum(assignments(routing.indices, num_experts, valid), axis=0)
    chosen = jnp.sum(counts)
    load = counts / jnp.maximum(chosen, 1)
    return RouterReport(
        load=load,
        balance_loss=sequence_balance_loss(routing.scores, routing.indices, valid),
        z_loss=router_z_loss(routing.logits, valid),
        max_violation=max_violation(load),
        idle=jnp.mean(counts == 0, dtype=jnp.float32),
        dropped=jnp.zeros(()) if computed is None else (chosen - computed) / jnp.maximum(chosen, 1),
        tokens=jnp.sum(_tokens(valid, routing.indices.shape[:2])),
    )


def weigh(report: RouterReport) -> RouterReport:
    """The report times its number of tokens, which stays: such are added up over batches; any leading axes."""
    tokens = report.tokens
    times = lambda leaf: leaf * tokens.reshape(*tokens.shape, *[1] * (leaf.ndim - tokens.ndim))  # noqa: E731
    return jax.tree.map(times, report)._replace(tokens=tokens)


def max_violation(load: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """max(load) / mean(load) - 1 (Wang et al., 2024); 0 where there is no load."""
    mean = jnp.mean(load, axis=-1)
    return jnp.where(mean > 0, jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1) - 1, 0)


def update_bias(
    bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], rate: float | Float[Array, ""]
) -> Float[Array, "*layers E"]:
    """bias + rate * (sign(e) - mean sign(e)) with e = mean(load) - load (Moonlight, appendix C).

    Centred, the biases keep their mean, which the choice does not depend on. To be called once a step with the load of
    the whole batch; the rate is 0.001 in the reports, and 0 in the decay phase.
    """
    signs = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    return bias + rate * (signs - jnp.mean(signs, axis=-1, keepdims=True))


def _tokens(valid, shape):
    """The valid tokens of each row."""
    return jnp.full(shape[0], float(shape[1])) if valid is None else jnp.sum(valid, axis=1, dtype=jnp.float32)
