"""Stacks of small sublayers that know nothing of transformers, run by the depth scan and by a rule's plain loop."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax.depth import depth_scan
from attnres_jax.models.plan import cut, slots_of

WIDTH, SUBLAYERS = 12, 6
PLAN = ["tanh", "linear"] * (SUBLAYERS // 2)


def call(kind, weight, h, context):
    """A sublayer, and what it reports. What it is given has to have the model's dtype, at every site."""
    assert h.dtype == weight.dtype, (h.dtype, weight.dtype)
    y = (jnp.tanh(h) if kind == "tanh" else h) @ weight + context
    return y, {"mean": y.mean()}


def draw(rule, dtype=jnp.float64, *, perturb=1 / 3, plan=PLAN):
    """(stacks, sites, embedding, context); the sites are moved away from their start by `perturb`.

    Drawn by NumPy, which compiles nothing.
    """

    def normal(seed, shape, scale=1.0):
        return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)

    def move(path, x):
        if not perturb:
            return x.astype(dtype)
        noise = normal(zlib.crc32(jax.tree_util.keystr(path).encode()), x.shape, perturb)
        # Smaller as well: mixing logits start at -8, where nothing mixes.
        return jnp.asarray(np.asarray(x) / 4, dtype) + noise

    stacks = {
        kind: normal(seed, (plan.count(kind), WIDTH, WIDTH), 1 / 4) for seed, kind in enumerate(dict.fromkeys(plan))
    }
    sites = jax.tree_util.tree_map_with_path(move, rule.init_sites(len(plan), WIDTH))
    return stacks, sites, normal(10, (2, 3, WIDTH)), normal(11, (WIDTH,), 1 / 10)


def scanned(rule, context, remat, stacks, sites, embedding, *, plan=PLAN):
    """The depth scan: what the head reads, and the sublayers' reports in order."""
    stream, newest = rule.begin(sites, embedding)
    segments = cut(plan, rule.block_size)
    *out, reports = depth_scan(rule, segments, call, stacks, sites, stream, newest, context, remat=remat)
    return rule.readout(sites, *out), means_of(reports)


def means_of(reports):
    """What the sublayers report, in order, from the reports of the segments."""
    return jnp.concatenate([jnp.stack([r["mean"] for r in report], 1).ravel() for report in reports])


def plain(rule, context, stacks, sites, embedding, *, plan=PLAN):
    """The rule's own loop, as one program: operation by operation it would be a hundred."""

    @jax.jit
    def run(stacks, sites, embedding):
        sublayers = [
            functools.partial(lambda kind, slot, h: call(kind, stacks[kind][slot], h, context)[0], kind, slot)
            for kind, slot in zip(plan, slots_of(plan), strict=True)
        ]
        return rule.plain(sites, embedding, sublayers)

    return run(stacks, sites, embedding)


def looped(rule, context, stacks, sites, embedding, *, plan=PLAN):
    """The plain loop, in the shape of `scanned`."""
    run = plain(rule, context, stacks, sites, embedding, plan=plan)
    return run.inputs[-1], jnp.stack([y.mean() for y in run.outputs])


def value_and_gradients(form, *arguments):
    """The value and, for a cotangent of cosines, the gradients in all arguments."""

    def both(*arguments):
        value, pullback = jax.vjp(form, *arguments)
        cotangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), value)
        return value, pullback(cotangent)

    return jax.jit(both)(*arguments)
