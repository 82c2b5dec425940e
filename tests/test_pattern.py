"""Layer patterns: what they expand to, and that the shortest text says the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_jax.pattern import expand, shorten

KINDS = ("kda", "mla", "gqa")


@pytest.mark.parametrize(
    ("pattern", "layers", "kinds"),
    [
        ("gqa", 3, "ggg"),
        ("kda*3,mla", 6, "kkkmkk"),
        ("mla,kda*", 4, "mkkk"),
        ("kda*5", 2, "kk"),
        (" kda * 2 , mla ", 3, "kkm"),
    ],
)
def test_expand(pattern, layers, kinds):
    assert "".join(kind[0] for kind in expand(pattern, layers, KINDS)) == kinds


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("kad*3", "'kad' is unknown; known: kda, mla, gqa"),
        ("", "'' is unknown"),
        ("kda*,mla", r"'kda\*' fills the rest and can only come last"),
        ("kda*0", r"'kda\*0' must end in a positive number"),
        ("kda*x", r"'kda\*x' must end in a positive number"),
    ],
)
def test_refusals(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(pattern, 4, KINDS)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=30))
def test_the_short_text_says_the_same(kinds):
    assert expand(shorten(kinds), len(kinds), KINDS) == kinds


def test_the_text_is_short():
    assert shorten(["kda", "kda", "kda", "mla"] * 5 + ["kda"]) == "kda*3,mla"
    assert shorten(["mla"] + ["kda"] * 9) == "mla,kda*"
    assert shorten(["gqa"] * 7) == "gqa"
