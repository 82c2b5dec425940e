"""What needs eight devices: run in a process of its own by `test_eight_devices.py`.

By itself: JAX_NUM_CPU_DEVICES=8 python -m pytest tests/parallel/eight_devices.py
"""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import ROOT, small_overrides

from attnres_jax.analysis.inspection import MAGNITUDES, inspect_model
from attnres_jax.config import (
    Config,
    DataConfig,
    DepthConfig,
    KDAConfig,
    MeshConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    TrainingConfig,
    load_config,
)
from attnres_jax.data import load_text, train_iterator
from attnres_jax.interop import load_pretrained, pretrained_config
from attnres_jax.layers import make_context, softmax_attention
from attnres_jax.layers.softmax_attention import attend
from attnres_jax.models import Decoder, named_leaves
from attnres_jax.parallel import (
    make_mesh,
    one_device_mesh,
    parameter_sharding,
    put_batch,
    replicated,
    use_mesh,
    with_shardings,
)
from attnres_jax.training import export_run, make_optimizer, new_state, restore_model, train
from attnres_jax.training.checkpoints import Checkpoints, abstract_state
from attnres_jax.training.loss import objective
from attnres_jax.training.optimizer import learning_rate_schedule
from attnres_jax.training.records import read_rows
from attnres_jax.training.start import initial_model

B, T, V, D = 8, 16, 64, 24


def model_of(kind, rule):
    """Three layers, a block each; `kimi` is a tiny Kimi Linear, `bounded` one with the gate of K3: half the code."""
    base = ModelConfig(
        vocab_size=V,
        width=D,
        num_layers=3,
        num_heads=4,
        head_dim=8,
        mlp_width=32,
        max_length=T,
        depth=DepthConfig(rule=rule, block_size=2),
        kda=KDAConfig(head_dim=8, gate_lower_bound=-5.0 if kind == "bounded" else 0.0),
        mla=MLAConfig(latent_dim=12, nope_dim=8, rope_dim=4, value_dim=8),
        moe=MoEConfig(num_experts=4, expert_width=8, num_groups=2, top_groups=2),
    )
    kimi = ("kda,kda,mla", "swiglu,moe*")
    plans = {"dense": ("gqa", "swiglu"), "moe": ("gqa", "moe"), "kimi": kimi, "bounded": kimi}
    attention, mlp = plans[kind]
    return dataclasses.replace(base, attention_layers=attention, mlp_layers=mlp)


def mesh_of(model, **sizes):
    """Of the first devices, as many as the sizes come to."""
    config = Config(
        model=model, data=DataConfig(batch_size=B, sequence_length=T), mesh=MeshConfig(**{"data": 1} | sizes)
    )
    return make_mesh(config, jax.devices()[: int(np.prod(list(sizes.values())))])


def drawn(model):
    """A model that float32 can follow to 1e-5, in whatever order its sums are taken.

    With queries that are not zero: at zero, a site's logits do not depend on its key scale. Queries of the delta rule
    are near its keys: what a document's first token reads is (q . k) v, and is normalised, however small it is. (Else a
    change of all parameters by 6e-8 moves gradients on one device by 1e-4, and here by 5e-6.)
    """
    drawn = Decoder(model, rngs=nnx.Rngs(0))
    drawn.sites = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), drawn.sites)
    if "kda" in drawn.sublayers:
        kda = drawn.sublayers["kda"]
        kda.query.kernel[...] = kda.key.kernel[...] + 0.1 * kda.query.kernel[...]
        kda.query_conv.taps[...] = kda.key_conv.taps[...] + 0.1 * kda.query_conv.taps[...]
    return drawn


def make_batch(rows=B):
    """Two documents a row, padding in the first; weights that differ from token to token."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, V, (rows, T + 1)).astype(np.int32)
    segments = np.where(np.arange(T) < 7, 1, 2).astype(np.int32) * np.ones((rows, 1), np.int32)
    segments[0, 14:] = 0
    positions = np.tile(np.concatenate([np.arange(7), np.arange(9)]), (rows, 1)).astype(np.int32)
    weights = (draw.random((rows, T)) * (segments > 0)).astype(np.float32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": positions,
        "weights": weights,
    }


BATCH = jax.tree.map(jnp.asarray, make_batch())
TOTAL = float(BATCH["weights"].sum())


def loss_and_gradients(model, batch):
    share = lambda model: objective(model, batch, jnp.ones(V), TOTAL, TrainingConfig(router_z_loss=1e-3))[0]  # noqa: E731
    return jax.value_and_grad(share)(model)


def places(mesh, model):
    """Where the parameters of a model, or its shapes, lie."""
    return jax.tree.map(lambda leaf: leaf.sharding, with_shardings(mesh, model))


def on_mesh(mesh, model):
    """(the model born there, the compiled program, its loss and gradients)."""
    with use_mesh(mesh):
        there = places(mesh, jax.eval_shape(lambda: drawn(model)))
        born = jax.jit(lambda: drawn(model), out_shardings=there)()
        batch = put_batch(mesh, BATCH)
        program = jax.jit(loss_and_gradients, out_shardings=(replicated(mesh), there)).lower(born, batch).compile()
        return born, program, program(born, batch)


on_one_device = jax.jit(loss_and_gradients)


@pytest.fixture(scope="module")
def single():
    """By kind and rule, the same on one device and without a mesh; each computed once."""
    known = {}

    def of(kind, rule):
        if (kind, rule) not in known:
            model = jax.jit(lambda: drawn(model_of(kind, rule)))()
            known[kind, rule] = model, on_one_device(model, BATCH)
        return known[kind, rule]

    return of


DENSE = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 4},
    {"context": 4},
    {"data": 2, "fsdp": 4},
    {"data": 2, "context": 2, "tensor": 2},
]
EXPERTS = [{"expert": 4}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}]
CASES = [
    *(("dense", rule, sizes) for rule in ("residual", "block", "full") for sizes in DENSE),
    *(("moe", "block", sizes) for sizes in EXPERTS),
    *(("moe", "residual", sizes) for sizes in EXPERTS[:2]),
    *(("moe", "full", sizes) for sizes in EXPERTS[::2]),
    ("bounded", "block", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("kimi", "block", {"data": 2, "context": 2}),
]
SLOW = [
    case
    for rule in ("residual", "block", "full")
    for sizes in (
        *({axis: 4} for axis in ("data", "fsdp", "tensor", "expert", "context")),
        {"data": 2, "tensor": 2},
        {"expert": 2, "context": 2},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"data": 2, "context": 2, "tensor": 2},
    )
    if (case := ("kimi", rule, sizes)) not in CASES
]


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9)


@pytest.mark.parametrize(
    "kind, rule, sizes",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_loss_and_gradients_are_those_of_one_device(kind, rule, sizes, single):
    model, (loss, gradients) = single(kind, rule)
    born, _, (got_loss, got) = on_mesh(mesh_of(model_of(kind, rule), **sizes), model_of(kind, rule))
    for name, leaf in named_leaves(born).items():
        np.testing.assert_array_equal(leaf, named_leaves(model)[name], err_msg=name)
    assert relative(got_loss, loss) < 1e-6
    errors = {name: relative(leaf, named_leaves(gradients)[name]) for name, leaf in named_leaves(got).items()}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_inspection_of_a_split_model_is_that_of_one_device(single):
    """Row by row, which the devices cannot divide."""
    model, rows = single("dense", "block")[0], {key: value[:2] for key, value in make_batch().items()}
    expected = inspect_model(model, rows)
    mesh = mesh_of(model_of("dense", "block"), fsdp=4, tensor=2)
    with use_mesh(mesh):
        found = inspect_model(jax.device_put(model, places(mesh, model)), rows)
    for key in (*MAGNITUDES, "depth_weights", "mixing_matrix"):
        np.testing.assert_allclose(getattr(found, key), getattr(expected, key), rtol=1e-5, err_msg=key)


def test_no_part_of_the_tokens_has_a_depth_gradient_near_that_of_all(single):
    """What a device would have that did not sum over an axis; `test_loss_and_gradients_..` tells the two apart.

    The parts are masks on the weights: one device computes them all from the whole batch.
    """
    model, (_, gradients) = single("dense", "block")
    rows, positions = np.indices((B, T))
    for part_of in (rows // (B // 2), positions // (T // 2)):
        batches = [BATCH | {"weights": BATCH["weights"] * (part_of == part)} for part in range(2)]
        parts = [on_one_device(model, batch)[1].sites for batch in batches]
        for name in ("query", "key_scale"):
            whole, *own = (getattr(sites, name)[...] for sites in (gradients.sites, *parts))
            assert relative(own[0] + own[1], whole) < 1e-5
            assert min(relative(part, whole) for part in own) > 0.1


@pytest.mark.parametrize("packed", [True, False])
def test_splash_attention_on_each_devices_own_queries(packed):
    """Rows, tokens and heads are split; interpreted."""
    length, heads, kv_heads, width = 256, 4, 2, 8
    sizes = {"data": 2, "context": 2, "tensor": 2}
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, length, n, width) for n in (heads, kv_heads, kv_heads))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = jnp.asarray(1 + (np.arange(length) >= np.array([[100], [250]])))

    def loss(implementation, segments, arrays):
        context = make_context(segments, segments if packed else None, None, 8, 100.0)
        return jnp.sum(jnp.sin(attend(*arrays, context, implementation=implementation)))

    expected = jax.jit(jax.value_and_grad(functools.partial(loss, "xla", segments)))(arrays)
    model = ModelConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    with use_mesh(mesh_of(dataclasses.replace(model, max_length=length), **sizes)):
        split = jax.jit(jax.value_and_grad(functools.partial(loss, "splash"), argnums=1))(segments, arrays)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("axis, kernel", [("context", "xla"), ("tensor", "cudnn")])
def test_cudnn_is_given_whole_rows(monkeypatch, axis, kernel):
    monkeypatch.setattr(softmax_attention, "platform", lambda: "gpu")
    with use_mesh(mesh_of(ModelConfig(), **{axis: 2})):
        assert softmax_attention.implementation_for("auto", jnp.zeros((2, 64, 4, 32), jnp.bfloat16)) == kernel


def test_no_device_holds_more_of_the_bank_than_its_tokens():
    """In the compiled loss and gradients of `full`: 6 sources of B x T x D over 8 parts of the tokens."""
    _, program, _ = on_mesh(mesh_of(model_of("dense", "full"), data=2, context=2, tensor=2), model_of("dense", "full"))
    text = program.as_text()
    banks = set(re.findall(rf"f32\[(6,(?:\d+,)*{D})\]", text))
    assert banks == {f"6,{B // 2},{T // 4},{D}"}, banks


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    changes = {
        "model.num_kv_heads": 2,
        "data.batch_size": 8,
        "optimizer.warmup_steps": 2,
        "training.steps": 8,
        "training.eval_every": 4,
    }
    return load_config(str(ROOT / "configs/tiny.py"), small_overrides(tmp_path_factory, changes))


def with_mesh(config, **sizes):
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


def test_a_checkpoint_goes_from_any_mesh_to_any_other(config, tmp_path):
    meshes = [
        one_device_mesh(),
        *(
            make_mesh(with_mesh(config, **sizes))
            for sizes in ({}, {"fsdp": 8}, {"stage": 2, "tensor": 2, "context": 2})
        ),
    ]
    optimizer = make_optimizer(config.optimizer, learning_rate_schedule(config.optimizer, 8))
    batches = train_iterator(load_text(config.data, config.model.vocab_size), config.data, seed=0)

    def noise():
        state = new_state(config, optimizer)
        adam = state.opt_state[1][0]
        draw = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
        moments = adam._replace(mu=jax.tree.map(draw, adam.mu), nu=jax.tree.map(draw, adam.nu))
        return dataclasses.replace(state, opt_state=(state.opt_state[0], (moments, *state.opt_state[1][1:])))

    want = jax.tree.map(host, jax.jit(noise)())
    for i, mesh in enumerate(meshes):
        shapes = abstract_state(config, mesh)
        state = jax.jit(noise, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()
        with Checkpoints(tmp_path / str(i), keep=1) as checkpoints:
            checkpoints.save(1, state, batches, {})
            for other in meshes:
                shapes = abstract_state(config, other)
                restored = checkpoints.restore(1, shapes, batches)
                for got, where, value in zip(*map(jax.tree.leaves, (restored, shapes, want)), strict=True):
                    assert got.sharding.is_equivalent_to(where.sharding, got.ndim)
                    np.testing.assert_array_equal(host(got), value)


def host(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def test_a_run_goes_on_on_another_mesh(config, tmp_path):
    """Half of a run on two meshes, half on a third: the losses of a run on one."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    summary = train(with_mesh(config, fsdp=4), whole)
    shutil.copytree(whole, moved)
    (moved / "summary.json").unlink()
    shutil.rmtree(moved / "checkpoints" / "8")
    again = train(with_mesh(config, tensor=2, context=2), moved)
    assert again["final_loss"] == pytest.approx(summary["final_loss"], rel=1e-5)
    losses = [[row["loss"] for row in read_rows(workdir / "metrics.jsonl")] for workdir in (whole, moved)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    _, model, _ = restore_model(moved)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(model)} == {1}
    mesh = make_mesh(with_mesh(config, fsdp=4))
    _, split, _ = restore_model(moved, mesh=mesh)
    for name, leaf in named_leaves(split).items():
        assert leaf.sharding.is_equivalent_to(parameter_sharding(mesh, name, leaf.shape), leaf.ndim)
        np.testing.assert_array_equal(leaf, named_leaves(model)[name])


def test_parameters_of_a_model_that_is_there_are_born_where_they_lie(config, tmp_path):
    """The held-out loss before the first step on a mesh is that of the trained model, whose parameters it has."""
    before = train(config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "model")
    start = dataclasses.replace(config.training, init_from=str(tmp_path / "model"))
    tokens = dataclasses.replace(config.data, tokenizer=str(tmp_path / "model"))
    further = dataclasses.replace(config, model=pretrained_config(tmp_path / "model"), training=start, data=tokens)
    train(with_mesh(further, fsdp=2, tensor=2, context=2), tmp_path / "further")
    first = read_rows(tmp_path / "further" / "metrics.jsonl")[0]
    assert (first["kind"], first["step"]) == ("eval", 0)
    assert first["loss"] == pytest.approx(before["final_loss"], rel=1e-5)
    mesh = make_mesh(with_mesh(further, fsdp=4, tensor=2))
    model = initial_model(further, abstract_state(further, mesh).model)
    _, trained, _ = restore_model(tmp_path / "run")
    for name, leaf in named_leaves(model).items():
        assert leaf.sharding.is_equivalent_to(parameter_sharding(mesh, name, leaf.shape), leaf.ndim)
        np.testing.assert_array_equal(leaf, named_leaves(trained)[name])


def test_micro_batches_of_a_split_batch(config, tmp_path):
    accumulation = dataclasses.replace(config.training, accumulation=2, steps=3)
    config = dataclasses.replace(config, training=accumulation)
    losses = []
    for i, sizes in enumerate(({"fsdp": 4, "data": 1, "tensor": 2}, {"context": 4}, {"stage": 2, "fsdp": 2})):
        train(with_mesh(config, **sizes), tmp_path / str(i))
        losses.append([row["loss"] for row in read_rows(tmp_path / str(i) / "metrics.jsonl")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_pretrained_parameters_lie_as_in_training():
    directory = ROOT / "tests/fixtures/qwen3_moe"
    plain = load_pretrained(directory)
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
    mesh = make_mesh(Config(model=plain.config, data=DataConfig(sequence_length=16), mesh=MeshConfig(**sizes)))
    split = load_pretrained(directory, mesh=mesh)
    for name, leaf in named_leaves(split).items():
        assert leaf.sharding == parameter_sharding(mesh, name, leaf.shape), name
        np.testing.assert_array_equal(leaf, named_leaves(plain)[name])
    experts = split.sublayers["moe"].gate.kernel[...]
    assert experts.addressable_shards[0].data.size * 8 == experts.size
    tokens = jnp.arange(24).reshape(4, 6)
    with use_mesh(mesh):
        got = jax.jit(lambda model: model(tokens))(split)
    np.testing.assert_allclose(got, jax.jit(lambda model: model(tokens))(plain), rtol=1e-4, atol=1e-5)
