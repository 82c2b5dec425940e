"""`mhc_lite`: mHC without iterations (Yang and Gao 2026, arXiv 2601.05732).

By the Birkhoff-von Neumann theorem the doubly stochastic matrices are the convex combinations of the n! permutation
matrices, so a softmax over n! logits gives one, exactly. All else is as in `mhc`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax.depth.mhc import UNLIKELY, ManifoldHyperConnections
from attnres_jax.depth.options import DEFAULTS, Options

MAX_STREAMS = 4  # 24 permutations; a fifth stream would make it 120, each with a projection of its own


class LiteHyperConnections(ManifoldHyperConnections):
    """mHC with the mixing of streams as a convex combination of permutations."""

    def __init__(self, block_size: int, eps: float, options: Options = DEFAULTS):
        super().__init__(block_size, eps, options)
        if options.streams > MAX_STREAMS:
            raise ValueError(
                f"streams={options.streams} is too many for mhc_lite, which weighs all permutations of them; "
                f"nearest: streams={MAX_STREAMS}, or the rule mhc"
            )

    def initial_carry(self) -> Float[np.ndarray, " K"]:
        """The identity, which comes first, far ahead of the other permutations."""
        return np.where(np.arange(len(permutations(self.options.streams))) == 0, 0.0, UNLIKELY)

    def carry(self, logits: Float[Array, "K *batch"]) -> Float[Array, "n n *batch"]:
        """The doubly stochastic matrix of these logits."""
        weights = jax.nn.softmax(logits, axis=0)
        # Entry i, j is the weight of all permutations that take i to j: sums, which XLA fuses, and no constant matrix.
        chosen = permutations(self.options.streams) == 1
        rows = [[sum(weights[k] for k in np.flatnonzero(entry)) for entry in row] for row in chosen.transpose(1, 2, 0)]
        return jnp.stack([jnp.stack(row) for row in rows])


def permutations(n: int) -> Float[np.ndarray, "K n n"]:
    """All n! permutation matrices, the identity first."""
    return np.eye(n)[np.array(list(itertools.permutations(range(n))))]
