"""Depth diagnostics of a training run: outputs, their gradients and depth weights by sublayer, every so many steps."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.config import MetricsConfig
from attnres_jax.depth.shares import entropy, shares
from attnres_jax.evaluation.perplexity import Batch, token_nll
from attnres_jax.models import Decoder, Trace, unrolled

TOKENS = 256
"""Of the batch's first sequence, as many are looked at: the model is causal, so a prefix is exact. Keeps it cheap."""
SPIKE = 10.0
"""Output RMS of the first sublayer over the median of the others, above which it counts as a spike."""


class DepthDiagnostics:
    """The measurement as the loop makes it; nothing is traced or compiled before its first use."""

    def __init__(self, config: MetricsConfig):
        self._config = config
        self._program: Callable | None = None

    def is_due(self, step: int) -> bool:
        """Whether `step` (counted from 1) is measured."""
        return self._config.depth and step % self._config.every == 0

    def measure(self, model: Decoder, batch: Batch, paused: Callable[[], Any] = contextlib.nullcontext) -> dict:
        """`depth_diagnostics` of a slice of `batch`, not waited for; what is compiled is so inside `paused()`."""
        part = {key: value[:1, :TOKENS] for key, value in batch.items()}
        if self._program is None:
            with paused():
                self._program = jax.jit(depth_diagnostics).lower(model, part).compile()
        return self._program(model, part)


def depth_diagnostics(model: Decoder, batch: Batch) -> dict[str, Float[Array, "..."]]:
    """Float32 metrics over the real tokens of `batch`; L sublayers, L+1 sites.

    output_rms [L]: RMS over tokens and channels of what each sublayer returns. output_grad_rms [L]: of the gradient of
    the summed token losses with respect to it. depth_entropy [L+1] and depth_max_weight [L+1]: of each site's weights
    as shares (which softmax weights are; absolute values over their sum where weights may be anything), in nats and as
    the largest, means over tokens; absent for a rule without weights. depth/spike: 1 where the first sublayer's output
    RMS exceeds `SPIKE` times the median of the others', else 0.
    """
    gradients, trace = output_gradients(model, batch)
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(real), 1.0)

    def rms(x: Float[Array, "L B T D"]) -> Float[Array, "L"]:
        squares = jnp.einsum("lbtd,bt->l", jnp.square(x.astype(jnp.float32)), real)
        return jnp.sqrt(squares / (tokens * x.shape[-1]))

    metrics = {"output_rms": rms(trace.outputs), "output_grad_rms": rms(gradients)}
    if trace.weights is not None:
        parts = [shares(site.astype(jnp.float32)) for site in trace.weights]
        metrics["depth_entropy"] = jnp.stack([jnp.sum(entropy(site) * real) for site in parts]) / tokens
        metrics["depth_max_weight"] = jnp.stack([jnp.sum(jnp.max(site, axis=0) * real) for site in parts]) / tokens
    first, others = metrics["output_rms"][0], metrics["output_rms"][1:]
    metrics["depth/spike"] = (first > SPIKE * jnp.median(others)).astype(jnp.float32)
    # A row of metrics.jsonl is JSON, which has no infinity: what overflows is the largest float.
    largest = float(jnp.finfo(jnp.float32).max)
    return {key: jnp.nan_to_num(value, nan=largest, posinf=largest) for key, value in metrics.items()}


def output_gradients(model: Decoder, batch: Batch) -> tuple[Float[Array, "L B T D"], Trace]:
    """The gradient of the summed, weighted token losses with respect to each sublayer's output, and the pass itself."""

    def loss(probes: Float[Array, "L B T D"]) -> tuple[Float[Array, ""], Trace]:
        trace = unrolled(model, batch["inputs"], batch["segment_ids"], batch["positions"], probes=probes)
        nll, _ = token_nll(trace.logits, batch["targets"])
        return jnp.sum(nll * batch["weights"]), trace

    probes = jnp.zeros((len(model.plan()), *batch["inputs"].shape, model.config.width))
    # The sum, not the mean: what reaches an output must not depend on how many tokens are looked at.
    return jax.grad(loss, has_aux=True)(probes)
