"""The decoder: layer plan -> segments -> stack."""

from attnres_jax.models.decoder import Decoder, head_dim, unrolled

__all__ = ["Decoder", "head_dim", "unrolled"]
