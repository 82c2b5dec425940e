"""Rotary position embedding (Su et al., 2021): in halves as Llama and Qwen have it, or interleaved; longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by a factor, fast ones kept, between them interpolated (`llama3`; Llama 3.1).

    Attributes:
      factor: what a slow frequency is divided by.
      low_frequency_factor: slow is whoever turns less often than this within `original_length`.
      high_frequency_factor: fast is whoever turns more often.
      original_length: of the training before the context was extended, in tokens.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0

    def scaled(self, frequencies: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        """The frequencies in place of `frequencies`, in radians a token."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = jnp.clip(kept, 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): as `Llama3Scaling`, but interpolated over the frequencies' index; the DeepSeek family.

    Attributes:
      factor: what a slow frequency is divided by.
      original_length: of the training before the context was extended, in tokens.
      beta_fast: whoever turns more often than this within `original_length` is kept.
      beta_slow: whoever turns less often is divided.
      mscale: with `mscale_all_dim`, sets the amplitude; None: it is 0.1 ln(factor) + 1.
      mscale_all_dim: see `mscale`, and `softmax_multiplier`.
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_multiplier(self) -> float:
        """What DeepSeek's attention multiplies its softmax scale with: see `MLA`."""
        return self._temperature(self.mscale_all_dim or 0.0) ** 2

    def scaled(self, frequencies: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        """The frequencies in place of `frequencies`, in radians a token."""
        head_dim = 2 * len(frequencies)

        def index(turns):
            return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), head_dim - 1)
        divided = (jnp.arange(len(frequencies)) - first) / (last - first if last > first else 0.001)
        divided = jnp.clip(divided, 0, 1)
        return (1 - divided) * frequencies + divided * frequencies / self.factor

    def _temperature(self, mscale):
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


RopeScaling = Llama3Scaling | YarnScaling


def rotary_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of position * theta^(-2i / K), float32; `scaling` changes the frequencies."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, theta)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H K"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """Turns the pair (x_i, x_{i + half}) by the position's i-th angle; float32 inside.

    `interleaved` pairs (x_{2i}, x_{2i + 1}), and still returns the halves layout: products of two vectors turned the
    same way do not depend on it.
    """
    wide = x.astype(jnp.float32)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
