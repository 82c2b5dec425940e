"""Exchanges between the devices of experts, on eight devices: run in a process of its own by `test_eight_devices.py`.

By itself: JAX_NUM_CPU_DEVICES=8 python -m pytest tests/parallel/expert_devices.py
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import BATCH, B, T, drawn, loss_and_gradients, mesh_of, model_of, on_mesh, relative
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_runs import ROOT, small_overrides

from attnres_jax.config import load_config
from attnres_jax.layers.expert_exchange import experts_across_devices, is_routed_better, plan_of
from attnres_jax.layers.experts import experts
from attnres_jax.layers.ragged_exchange import Slices, exchange, turned
from attnres_jax.models import named_leaves
from attnres_jax.parallel import use_mesh
from attnres_jax.training import train
from attnres_jax.training.records import read_rows

E, K, D, F = 8, 3, 6, 4
MODEL = model_of("moe", "block")
EIGHT = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, num_experts=E))
MESHES = [{"expert": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}]


@pytest.fixture(scope="module")
def slices():
    """Four devices, two slices for each: some empty, with gaps before, between and behind; by sender, then receiver."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(0, 4, (4, 4, 2))
    sizes[1, 2], sizes[3, :, 0] = 0, 0
    starts = 1 + np.cumsum(sizes.reshape(4, -1) + 1, axis=1).reshape(sizes.shape) - sizes - 1
    arriving = sizes.transpose(1, 0, 2).reshape(4, -1)
    places = 2 + np.cumsum(arriving + 1, axis=1) - arriving - 1
    places = places.reshape(4, 4, 2).transpose(1, 0, 2)
    return Slices(*(jnp.asarray(part.reshape(4, -1), jnp.int32) for part in (starts, sizes, places, arriving)))


def moved(rows, slices, room):
    """NumPy's word on an exchange; rows [4, R, D]."""
    there = np.zeros((4, room, rows.shape[-1]), rows.dtype)
    for device in range(4):
        for i in range(8):
            start, size, place = (int(part[device, i]) for part in slices[:3])
            there[i // 2, place : place + size] = rows[device, start : start + size]
    return there


def test_an_exchange_and_its_derivative(slices):
    rows, room = np.random.default_rng(1).normal(size=(4, 36, 3)).astype(np.float32), 40
    mesh = jax.make_mesh((4,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:4])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def run(rows, slices):
        there, back = jax.vjp(lambda rows: exchange(rows, slices, room, ("expert",)), rows[0])
        return there[None], back(jnp.cos(there))[0][None], jax.tree.map(lambda x: x[None], turned(slices, ("expert",)))

    run_flat = jax.jit(lambda rows, slices: run(rows, jax.tree.map(lambda x: x.reshape(-1), slices)))
    there, back, way_back = run_flat(rows, slices)
    np.testing.assert_array_equal(there, moved(rows, slices, room))
    np.testing.assert_allclose(back, moved(np.cos(there), way_back, 36), rtol=1e-6)
    sent = moved(moved(np.ones_like(rows), slices, room), way_back, 36)  # ones come back where rows left
    np.testing.assert_allclose(back, np.cos(rows) * sent, rtol=1e-6)
    # What the two ends disagree about is no exchange at all.
    wrong = slices._replace(arriving=slices.arriving.at[0, 7].add(1))
    assert np.isnan(run_flat(rows, wrong)[0]).any()


def case(load, dtype=jnp.float32):
    """Rows of tokens, the last of each padding; their experts are `random`, or two of their three on `one` device."""
    keys = jax.random.split(jax.random.key(0), 7)
    x = jax.random.normal(keys[0], (B, T, D), dtype)
    scores = jax.random.normal(keys[1], (B, T, E)) + (10 * (jnp.arange(E) < 2) if load == "one" else 0)
    weights = jax.random.uniform(keys[2], (B, T, K))
    kernels = [jax.random.normal(keys[3 + i], shape) for i, shape in enumerate([(E, D, F), (E, D, F), (E, F, D)])]
    valid = jnp.ones((B, T), bool).at[:, -2:].set(False)
    return valid, jax.lax.top_k(scores, K)[1], (x, weights, *kernels), jax.random.normal(keys[6], (B, T, D))


def values(indices, valid, towards, inputs, **options):
    """Experts' sums of the valid tokens, gradients of all that has one, and how many assignments were computed."""

    def loss(x, weights, *kernels):
        y, computed = experts_across_devices(
            x, indices, weights, *kernels, valid=valid, activation="silu", implementation="auto", **options
        )
        y = jnp.where(valid[..., None], y, 0)
        return jnp.sum(y * towards), (y, computed)

    gradients, (y, computed) = jax.grad(loss, argnums=range(5), has_aux=True)(*inputs)
    return (y, *gradients), computed


@pytest.mark.parametrize("load", ["random", "one"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_routed_experts_are_those_of_one_device(sizes, load):
    valid, indices, inputs, towards = case(load)
    want, _ = jax.jit(functools.partial(values, indices, valid, towards))(inputs)
    # Padding does not travel: its values could be anything.
    x = jnp.where(valid[..., None], inputs[0], jnp.nan)
    with use_mesh(mesh_of(EIGHT, **sizes)):
        run = jax.jit(functools.partial(values, indices, valid, towards, way="routed"))
        got, computed = run((x, *inputs[1:]))
    assert computed == valid.sum() * K
    for name, a, b in zip(("y", "x", "weights", "gate", "up", "down"), got, want, strict=True):
        assert relative(a, b) < 1e-5, name


def test_too_little_room_drops_the_rest_and_counts_it():
    """Two of every token's three experts are the first two."""
    valid, indices, (x, weights, *kernels), towards = case("one")
    with use_mesh(mesh_of(EIGHT, expert=8)):
        run = jax.jit(functools.partial(values, indices, valid, towards, way="routed", capacity=1.0))
        (y, *_), computed = run((x, weights, *kernels))
    # In the order of senders, and so of rows and tokens, an expert takes what there is room for.
    room, kept, taken = T * K, np.zeros(indices.shape, bool), np.zeros(E, int)
    for row, token in np.argwhere(valid):
        chosen = np.asarray(indices[row, token])
        kept[row, token] = taken[chosen] < room
        taken[chosen] += 1
    assert computed == kept.sum() < valid.sum() * K
    flat = lambda part: part.reshape(B * T, -1)  # noqa: E731
    want = experts(flat(x), flat(indices), flat(weights * kept), *kernels).reshape(B, T, D)
    assert relative(y, want) < 1e-5


def test_a_plan_fills_each_device_in_order():
    counts = jnp.array([[2, 0, 1, 3], [1, 4, 0, 2]])  # two devices, two experts each
    slices, arrived = plan_of(counts, jnp.int32(1), 6)
    assert slices.starts.tolist() == [0, 1, 5, 5] and slices.sizes.tolist() == [1, 3, 0, 2]
    assert slices.places.tolist() == [2, 3, 0, 4] and slices.arriving.tolist() == [1, 3, 0, 2]
    assert arrived.tolist() == [1, 5]


def test_the_better_exchange_by_bytes():
    assert is_routed_better(8, 8, 2) and is_routed_better(4, 2, 2) and not is_routed_better(4, 8, 2)
    assert not is_routed_better(2, 2, 4)


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}])
def test_a_model_with_routed_experts(sizes):
    """Loss and gradients of one device, whose layers run in scans and are recomputed."""
    model = dataclasses.replace(MODEL, expert_exchange="routed", remat="full")
    loss, gradients = jax.jit(loss_and_gradients)(jax.jit(lambda: drawn(MODEL))(), BATCH)
    _, _, (got_loss, got) = on_mesh(mesh_of(model, **sizes), model)
    assert relative(got_loss, loss) < 1e-6
    errors = {name: relative(leaf, named_leaves(gradients)[name]) for name, leaf in named_leaves(got).items()}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_a_gradient_of_experts_is_summed_into_the_parts_that_devices_keep():
    """Four experts over `expert` and `fsdp`, one on each device at rest; no sum of the two that it computes with."""
    _, program, _ = on_mesh(mesh_of(MODEL, fsdp=2, expert=2), MODEL)
    sums = re.findall(r"= (.*) (all-reduce|reduce-scatter)\(", program.as_text())
    shapes = {kind: " ".join(shape for shape, of in sums if of == kind) for kind in ("all-reduce", "reduce-scatter")}
    assert len(re.findall(r"f32\[1,(24,8|8,24)\]", shapes["reduce-scatter"])) == 3
    assert not re.search(r"f32\[(\d+,)?2,(24,8|8,24)\]", shapes["all-reduce"])


def test_what_training_reports(tmp_path_factory):
    """Losses of the dense exchange; nothing dropped but for want of room; the busiest device above an even load."""
    changes = {"data.batch_size": 8, "optimizer.warmup_steps": 1, "training.steps": 2, "mesh.expert": 4}
    moe = {"model.mlp_layers": "moe", "model.moe.expert_width": 8, "mesh.data": 2}
    overrides = small_overrides(tmp_path_factory, changes | moe)
    rows = {}
    for name, more in {"dense": [], "routed": [], "narrow": ["model.expert_capacity=0.5"]}.items():
        way = f"model.expert_exchange={'dense' if name == 'dense' else 'routed'}"
        workdir = tmp_path_factory.mktemp(name)
        train(load_config(str(ROOT / "configs/tiny.py"), [*overrides, way, *more]), workdir)
        rows[name] = [row for row in read_rows(workdir / "metrics.jsonl") if row["kind"] == "train"]
    for dense, routed, narrow in zip(*rows.values(), strict=True):
        assert routed["loss"] == pytest.approx(dense["loss"], rel=1e-5)
        assert routed["router/device_violation"] == pytest.approx(dense["router/device_violation"], rel=1e-5)
        assert 0 < routed["router/device_violation"] <= routed["router/max_violation"]
        assert dense["router/dropped"] == routed["router/dropped"] == 0 < narrow["router/dropped"] < 0.75
