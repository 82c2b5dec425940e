"""The parameters of AttnRes: one pseudo-query and one key scale a site, or what an option has in their place."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.depth.options import DEFAULTS, Options


class Sites(nnx.Module):
    """Pseudo-queries and key scales of all sites: every sublayer in order, then the output readout.

    Queries start at zero: every site then reads the mean of its sources, and behind the pre-norms the model is exactly
    the residual baseline (section 5). The query of site 0 is inert, since it has one source only. Options add
    `query_projection` [L+1, D, D] and `recency` [L+1], or put `source_logit` [L+1, sources] in the place of both.

    Raises:
      ValueError: if the heads do not divide the width.
    """

    def __init__(self, num_sublayers: int, width: int, options: Options = DEFAULTS, num_sources: int = 0):
        if width % options.heads:
            raise ValueError(f"heads={options.heads} does not divide the width {width}")
        sites = num_sublayers + 1
        if options.query == "none":
            self.source_logit = nnx.Param(jnp.zeros((sites, num_sources)))
        else:
            self.query = nnx.Param(jnp.zeros((sites, width)))
        if options.query != "none" and options.key_norm:
            self.key_scale = nnx.Param(jnp.ones((sites, width)))
        if options.query == "input":
            self.query_projection = nnx.Param(jnp.zeros((sites, width, width)))
        if options.recency_bias:
            self.recency = nnx.Param(jnp.full(sites, options.recency_bias))

    def at(self, site: int | Int[Array, ""]) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
        """One site's query and key scale; without key norm, ones."""
        query = self.query[site]
        return query, self.key_scale[site] if hasattr(self, "key_scale") else jnp.ones_like(query)
