"""Evaluation of trained models."""

from attnres_jax.evaluation.perplexity import HeldOut, evaluate

__all__ = ["HeldOut", "evaluate"]
