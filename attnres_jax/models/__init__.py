"""The decoder: layer plan -> segments -> stack."""

from attnres_jax.models.decoder import Decoder, Trace, head_dim, unrolled

__all__ = ["Decoder", "Trace", "head_dim", "unrolled"]
