"""The registry of depth rules."""

import pytest

from attnres_jax.depth import RULES, Full, Rule, make_rule


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_what_the_scan_and_the_decoder_ask_for(name):
    rule = make_rule(name, 4, 1e-6)
    assert isinstance(rule, Rule)
    assert all(callable(getattr(rule, method)) for method in ("init_sites", "begin", "readout", "plain"))
    assert rule.num_appended(4) == {"residual": 0, "block": 1, "full": 4}[name]


def test_blocks_of_one_sublayer_are_full_attnres():
    assert isinstance(make_rule("block", 1, 1e-6), Full)
    assert make_rule("block", 1, 1e-6).block_size == 2
