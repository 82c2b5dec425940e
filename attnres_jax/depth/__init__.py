"""How a sublayer reads from earlier ones: the depth-attention operator, the rules, the append-only scan."""

from attnres_jax.depth.block import Block
from attnres_jax.depth.delta import Delta
from attnres_jax.depth.delta_block import DeltaBlock
from attnres_jax.depth.denseformer import DenseFormer
from attnres_jax.depth.full import Full
from attnres_jax.depth.hyper_connections import HyperConnections
from attnres_jax.depth.input_query import InputQuery
from attnres_jax.depth.lambdas import Lambdas
from attnres_jax.depth.layerscale import LayerScale
from attnres_jax.depth.mhc import ManifoldHyperConnections
from attnres_jax.depth.mhc_lite import LiteHyperConnections
from attnres_jax.depth.muddformer import MUDDFormer
from attnres_jax.depth.operator import State, depth_attention, inter_block, merge, normalise
from attnres_jax.depth.options import DEFAULTS, Options, check
from attnres_jax.depth.residual import Residual
from attnres_jax.depth.rezero import ReZero
from attnres_jax.depth.rms_block import RMSBlock
from attnres_jax.depth.scan import REMAT_POLICIES, Part, Place, Rule, Segment, Window, depth_scan, num_appended
from attnres_jax.depth.sites import Sites

RULES = {
    "residual": Residual,
    "rezero": ReZero,
    "layerscale": LayerScale,
    "lambdas": Lambdas,
    "hyper_connections": HyperConnections,
    "mhc": ManifoldHyperConnections,
    "mhc_lite": LiteHyperConnections,
    "full": Full,
    "block": Block,
    "rms_block": RMSBlock,
    "delta": Delta,
    "delta_block": DeltaBlock,
    "denseformer": DenseFormer,
    "muddformer": MUDDFormer,
}


def make_rule(name: str, block_size: int, eps: float, options: Options = DEFAULTS) -> Rule:
    """The depth rule called `name`, with blocks of `block_size` sublayers and `eps` in its norms.

    Raises:
      ValueError: beginning with `option=value` (or `rule=name`), what is allowed after it.
    """
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; known: {', '.join(RULES)}")
    check(options, RULES[name].OPTIONS, name)
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    # A block of one sublayer is a source of its own: the rule without blocks, which schedules two or more at a time.
    if block_size == 1:
        name = {"block": "full", "delta_block": "delta"}.get(name, name)
    if name != "rms_block":
        block_size = max(block_size, 2)
    if options.query == "input":
        if name not in ("block", "full"):
            raise ValueError(f"query='input' is no option of {name}; rules with it: block, full")
        return InputQuery(block_size, eps, options, 1 if name == "full" else block_size)
    return RULES[name](block_size, eps, options)


__all__ = [
    "DEFAULTS",
    "REMAT_POLICIES",
    "RULES",
    "Block",
    "Full",
    "Options",
    "Part",
    "Place",
    "Residual",
    "Rule",
    "Segment",
    "Sites",
    "State",
    "Window",
    "depth_attention",
    "depth_scan",
    "inter_block",
    "make_rule",
    "merge",
    "normalise",
    "num_appended",
]
