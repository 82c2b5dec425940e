"""Shares: how a site divides itself over its sources, whatever its weights sum to; for NumPy and JAX arrays alike."""

import numpy as np
from jaxtyping import Array, Float


def shares(weights: Float[Array | np.ndarray, "..."], axis: int = 0) -> Float[Array | np.ndarray, "..."]:
    """Absolute values over their sum along `axis`.

    Softmax weights are their own shares. Where weights may be negative (DenseFormer, hyper-connections) or sum to
    anything (sigmoid), a source counts by how strongly it is read, with either sign. Where all are zero, so are the
    shares.
    """
    sizes = abs(weights)
    total = sizes.sum(axis, keepdims=True)
    return sizes / (total + (total == 0))


def entropy(shares: Float[Array | np.ndarray, "..."], axis: int = 0) -> Float[Array | np.ndarray | np.generic, "..."]:
    """-sum p log p along `axis`, in nats: 0 where one source has it all, log n where n sources share alike."""
    log = shares.__array_namespace__().log
    return -(shares * log(shares + (shares == 0))).sum(axis)
