"""The parameters of AttnRes: one pseudo-query and one key scale a site."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Sites(nnx.Module):
    """Pseudo-queries and key scales of all sites: every sublayer in order, then the output readout.

    Queries start at zero: every site then reads the mean of its sources, and behind the pre-norms the model is exactly
    the residual baseline (section 5). The query of site 0 is inert, since it has one source only.
    """

    def __init__(self, num_sublayers: int, width: int):
        self.query = nnx.Param(jnp.zeros((num_sublayers + 1, width)))
        self.key_scale = nnx.Param(jnp.ones((num_sublayers + 1, width)))

    def at(self, site: int | Int[Array, ""]) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """One site's query and key scale."""
        return self.query[site], self.key_scale[site]
