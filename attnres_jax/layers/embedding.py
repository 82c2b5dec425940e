"""Token embedding, and the output head that may share its table."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from attnres_jax.axes import HIDDEN, ROW, constrain


class Embedding(nnx.Module):
    """A table [V, D] drawn from N(0, 0.02)."""

    def __init__(self, vocab_size: int, width: int, dtype: str, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab_size, width)))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows."""
        return constrain(jnp.take(self._table(), tokens, axis=0).astype(self.dtype), *HIDDEN)

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The table as an output head; float32."""
        h = constrain(h, *ROW)
        logits = jnp.einsum("btd,vd->btv", h, self._table().astype(h.dtype), preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "length", "vocab")

    def _table(self) -> Float[Array, "V D"]:
        """Whole in D: devices that split it have tokens of their own to look up."""
        return _whole(self.table[...])


@jax.custom_vjp
def _whole(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The table put together along D; its gradient is summed into the parts that devices keep, half as many bytes."""
    return constrain(table, "vocab", None)


def _parts(_, table_bar):
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:  # where XLA fails to split a scatter by itself
        table_bar = constrain(table_bar, "vocab", None)
    return (constrain(table_bar, "vocab", "width"),)


_whole.defvjp(lambda table: (_whole(table), None), _parts)
