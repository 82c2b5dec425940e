"""Hugging Face checkpoints in and out, and residual models turned into AttnRes without loss."""

from attnres_jax.interop.convert import Verification, convert, verify
from attnres_jax.interop.errors import InteropError
from attnres_jax.interop.pretrained import load_pretrained, pretrained_config, save_pretrained
from attnres_jax.interop.tokenizer import ModelTokenizer, load_tokenizer

__all__ = [
    "InteropError",
    "ModelTokenizer",
    "Verification",
    "convert",
    "load_pretrained",
    "load_tokenizer",
    "pretrained_config",
    "save_pretrained",
    "verify",
]
