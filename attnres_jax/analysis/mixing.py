"""The depth-mixing matrix: what every site reads of the embedding and of each output, and what its shape says.

Row l of M holds the effective weights of site l under any rule (the paper's unified view, Table 5): ones for the
residual stream, the depth weights for Full AttnRes, a block's weight at each of its outputs for Block AttnRes, and for
hyper-connections what their mixing matrices multiply to. M is lower triangular: a site reads what came before it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from attnres_jax.depth.shares import entropy, shares

MEASURES = {
    "entropy": "entropy, nats",
    "evenness": "entropy / log of sources",
    "sharpness": "sharpness (largest share)",
    "embedding_share": "embedding share",
    "effective_rank": "effective rank",
    "separable_rank": "separable rank",
}
"""What `Mixing.summary` holds, and how a table calls it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mixing:
    """A depth-mixing matrix and its measures; L+1 sites, the readout last, over the embedding and L outputs.

    Everything is of the mean matrix. The entropy of a mean is at least the mean of the tokens' entropies, and is larger
    where tokens read differently: `depth_entropy` of a run with `metrics.depth` is the latter, of the depth weights.
    """

    matrix: Float[np.ndarray, "sites sites"]
    """Effective weights; NaN above the diagonal, where there is nothing yet to read. Rows need not sum to one, and
    weights may be negative."""
    relative: Float[np.ndarray, "sites sites"]
    """Each row over its mean absolute weight: 1 is an even share, NaN above the diagonal. Behind a norm, as every
    sublayer and the head are, nothing else of a row is heard; what equals the residual network is ones here."""
    shares: Float[np.ndarray, "sites sites"]
    """Absolute weights over their row's sum, NaN above the diagonal."""
    entropy: Float[np.ndarray, "sites"]
    """Of each row of `shares`, nats."""
    evenness: Float[np.ndarray, "sites"]
    """The entropy over its largest value, the logarithm of the number of sources; NaN at the first site, which has one
    source. 1: all count alike."""
    sharpness: Float[np.ndarray, "sites"]
    """The largest share of each row. 1: the site reads one source alone."""
    embedding_share: Float[np.ndarray, "sites"]
    """Column 0 of `shares`."""
    effective_rank: float
    """exp of the entropy of the shares of `relative`'s singular values (Roy and Vetterli 2007): n for n equal ones."""
    separable_rank: float
    """The largest effective rank of what crosses one depth: the weights from site l on of all that site l can read.

    The rank of these parts, by which matrices are called semiseparable, is the number of streams that could carry the
    mixing through depth: 1 for residual, at most m for a token's hyper-connections with m streams, at most N+1 for
    Block AttnRes with N blocks, as many as there are sources or sites left for Full. The rank of all of M tells
    nothing of that: a triangle without zeros on its diagonal has full rank.
    """

    def summary(self) -> dict[str, float]:
        """The `MEASURES`: a rank as it is, the others as means over the sites that have a choice, all but the first."""
        values = {key: getattr(self, key) for key in MEASURES}
        return {key: float(np.mean(value[1:]) if np.ndim(value) else value) for key, value in values.items()}


def depth_mixing(matrix: Float[np.ndarray, "sites sites"]) -> Mixing:
    """Measures a mean matrix, such as `Inspection.mixing_matrix`; what stands above its diagonal does not count."""
    count = np.arange(1, len(matrix) + 1)
    known = np.tri(len(matrix), dtype=bool)
    weights = np.where(known, matrix, 0).astype(np.float64)
    parts = shares(weights, axis=1)
    relative = np.sign(weights) * parts * count[:, None]
    entropies = entropy(parts, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 at the first site
        evenness = entropies / np.log(count)
    crossing = (relative[site:, : site + 1] for site in range(len(matrix)))
    return Mixing(
        matrix=_blank(weights, known),
        relative=_blank(relative, known),
        shares=_blank(parts, known),
        entropy=entropies,
        evenness=evenness,
        sharpness=parts.max(axis=1),
        embedding_share=parts[:, 0],
        effective_rank=effective_rank(relative),
        separable_rank=float(np.max([effective_rank(part) for part in crossing])),
    )


def effective_rank(matrix: Float[np.ndarray, "rows columns"]) -> float:
    """exp(-sum p log p), p the singular values over their sum; 0 of a zero matrix, NaN of one that is not finite."""
    if not np.isfinite(matrix).all():
        return float("nan")
    parts = shares(np.linalg.svd(matrix, compute_uv=False))
    return float(np.exp(entropy(parts))) if parts.any() else 0.0


def _blank(values: Float[np.ndarray, "sites sites"], known: Bool[np.ndarray, "sites sites"]) -> np.ndarray:
    return np.where(known, values, np.nan)
