"""The decoder: layer plan -> segments -> stack; and the families of released models."""

from attnres_jax.models.decoder import Decoder, Trace, call_sublayer, plan_of, reports_in_order, rule_of, unrolled
from attnres_jax.models.families import FAMILIES, PRESETS, default_block_size, family_of, preset
from attnres_jax.models.family import Family, differences
from attnres_jax.models.parameters import activated_parameters, named_leaves, parameter_name

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Decoder",
    "Family",
    "Trace",
    "activated_parameters",
    "call_sublayer",
    "default_block_size",
    "differences",
    "family_of",
    "named_leaves",
    "parameter_name",
    "plan_of",
    "preset",
    "reports_in_order",
    "rule_of",
    "unrolled",
]
