"""Short depthwise causal convolution, as in front of the queries, keys and values of linear attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.layers.delta_rule import document_starts


class ShortConvolution(nnx.Module):
    """silu(sum_i taps[size - 1 - i] * x_{t - i}) of each channel on its own, without bias.

    The last tap is the current token's, as in the checkpoints' Conv1d. Sum and SiLU are float32, the result in the
    dtype of the input. Its state is the last `size - 1` inputs, oldest first, zeros before a document's start.
    """

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(size)  # what Conv1d of one input channel a group draws from
        self.taps = nnx.Param(jax.random.uniform(rngs.params(), (size, channels), minval=-bound, maxval=bound))

    def __call__(
        self,
        x: Float[Array, "B T channels"],
        state: Float[Array, "B before channels"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T channels"], Float[Array, "B before channels"]]:
        """Convolves a row that goes on after `state`; returns the result and the state after the row.

        Args:
          x: the inputs.
          state: the inputs before the row, of the row's first document.
          segment_ids: documents, as runs of equal ids: none sees the inputs of another.
        """
        starts = None if segment_ids is None else document_starts(segment_ids)[..., None]
        taps = self._wide_taps()
        shifted, total, last = x, taps[-1] * x.astype(taps.dtype), []
        for i in range(1, len(taps)):
            last.append(shifted[:, -1])
            # One token further back: through the state at the row's start, not past the start of a document.
            shifted = jnp.concatenate([state[:, state.shape[1] - i, None].astype(x.dtype), shifted[:, :-1]], axis=1)
            shifted = shifted if starts is None else jnp.where(starts, 0, shifted)
            total += taps[-1 - i] * shifted.astype(taps.dtype)
        after = jnp.stack(last[::-1], axis=1).astype(state.dtype) if last else state
        return jax.nn.silu(total).astype(x.dtype), after

    def step(
        self, x: Float[Array, "B channels"], state: Float[Array, "B before channels"]
    ) -> tuple[Float[Array, "B channels"], Float[Array, "B before channels"]]:
        """One token."""
        window = jnp.concatenate([state, x[:, None].astype(state.dtype)], axis=1)
        taps = self._wide_taps()
        total = jnp.sum(taps * window.astype(taps.dtype), axis=1)
        return jax.nn.silu(total).astype(x.dtype), window[:, 1:]

    def _wide_taps(self):
        taps = self.taps[...]
        return taps.astype(jnp.promote_types(taps.dtype, jnp.float32))

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B before channels"]:
        """Nothing before the row."""
        size, channels = self.taps.shape
        return jnp.zeros((batch, size - 1, channels), dtype)
