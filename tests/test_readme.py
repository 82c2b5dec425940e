"""The README's code runs and computes what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from numerics import worst

from attnres_jax.depth import Block

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_operator_example_is_block_attnres(scale):
    """Against the project's plain loop; with zero queries also against the mean of everything, the residual sum."""
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], namespace)
    keys = jax.random.split(jax.random.key(0), 4)
    h, weights = jax.random.normal(keys[0], (3, 8)), jax.random.normal(keys[1], (6, 8, 8)) / 3
    sublayers = [lambda x, w=w: jnp.tanh(x @ w) for w in weights]
    rule = Block(4, 1e-6)
    sites = jax.tree.map(lambda x: x + scale * jax.random.normal(keys[2], x.shape), rule.init_sites(6, 8))
    out = namespace["forward"](h, sublayers, sites.query[...], sites.key_scale[...])
    plain = rule.plain(sites, h, sublayers)
    assert worst(out, plain.inputs[-1]) < 1e-6
    low = [x.astype(jnp.bfloat16) for x in (h, sites.query[...], sites.key_scale[...])]
    seen = []
    sublayers = [lambda x, w=w: seen.append(x.dtype) or jnp.tanh(x @ w.astype(x.dtype)) for w in weights]
    assert namespace["forward"](low[0], sublayers, *low[1:]).dtype == jnp.bfloat16
    assert all(dtype == jnp.bfloat16 for dtype in seen)
    if not scale:
        assert worst(out, (h + sum(plain.outputs)) / 3) < 1e-6


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
