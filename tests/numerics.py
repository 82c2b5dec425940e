"""How tests compare arrays, and what they read in programs."""

from collections.abc import Iterator

import jax
import numpy as np


def worst(left, right) -> float:
    """The largest relative difference of two pytrees' leaves, each in the norm of the leaf; NaN if any leaf has one."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return float(np.max([_difference(x, y) for x, y in zip(*map(jax.tree.leaves, (left, right)), strict=True)]))


def _difference(x, y) -> float:
    x, y = (np.asarray(each).astype(np.float64) for each in (x, y))
    assert x.shape == y.shape
    return np.linalg.norm(x - y) / (np.linalg.norm(y) + 1e-30)


def equations(program) -> Iterator:
    """All operations of what `jax.make_jaxpr` returns, within the programs that an operation calls too."""
    programs = [program.jaxpr]
    for program in programs:
        for equation in program.eqns:
            yield equation
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
            inner = (getattr(each, "jaxpr", each) for each in inner)
            programs += [each for each in inner if hasattr(each, "eqns")]


def precisions(program) -> set:
    """Of all products of float32 arrays."""
    products = (each for each in equations(program) if each.primitive.name == "dot_general")
    wide = (each for each in products if {x.aval.dtype for x in each.invars} == {np.dtype(np.float32)})
    return {each.params["precision"] for each in wide}


HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
