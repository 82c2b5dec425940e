"""Plans of several kinds of sublayers: scan against plain loop, parity at zero queries, reports, packing, segments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import equations, worst

from attnres_jax import ModelConfig, build_model
from attnres_jax.config import DepthConfig, KDAConfig, MLAConfig, MoEConfig, RopeScalingConfig
from attnres_jax.models import unrolled
from attnres_jax.models.plan import cut, slots_of

TINY = ModelConfig(
    attention_layers="kda*2,mla",
    mlp_layers="swiglu,moe*",
    vocab_size=61,
    width=24,
    num_layers=5,
    num_heads=2,
    mlp_width=32,
    max_length=20,
    norm_eps=1e-14,
    kda=KDAConfig(head_dim=8, gate_lower_bound=-5.0),  # one form of the delta rule to compile
    mla=MLAConfig(latent_dim=12, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(num_experts=4, expert_width=16, scaling=1.5),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 20), 0, 61)
SEGMENTS = jnp.array([[1] * 7 + [2] * 11 + [0] * 2, [1] * 17 + [2] * 3])
POSITIONS = jnp.array([[*range(7), *range(11), 0, 0], [*range(17), *range(3)]])
RULES = [("residual", 2), ("block", 4), ("full", 2)]  # ten sublayers: blocks of 4 differ in kinds


def make(rule, block_size, queries=0.3, **changes):
    config = dataclasses.replace(TINY, depth=DepthConfig(rule=rule, block_size=block_size), **changes)
    model = jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()
    draw = jax.tree.map(lambda x: x + queries * jax.random.normal(jax.random.key(7), x.shape), model.sites)
    model.sites = draw
    return model


def objective(logits, reports):
    return (jax.nn.log_softmax(logits)[..., 3] ** 2).mean() + 0.1 * reports.balance_loss.sum() + reports.z_loss.mean()


def test_yarn_is_for_attention_that_rotates():
    """Else a `rope_scaling` that no layer reads would change what the model computes."""
    scaling = RopeScalingConfig(kind="yarn", factor=40.0, mscale_all_dim=1.0)
    for rotary, expected in ((False, 1), (True, (0.1 * np.log(40) + 1) ** 2)):
        mla = dataclasses.replace(TINY.mla, rotary=rotary)
        config = dataclasses.replace(TINY, mla=mla, rope_scaling=scaling)
        layer = nnx.eval_shape(lambda config=config: build_model(config, rngs=nnx.Rngs(0))).sublayers["mla"]
        assert layer.scale == pytest.approx(expected * 12**-0.5)


@pytest.fixture(scope="module", params=RULES, ids=str)
def model(request):
    return make(*request.param)


def test_layers_and_experts_are_drawn_independently(model):
    """No two of all layers' and experts' kernels are equal."""
    leaves = jax.tree_util.tree_leaves_with_path(model.sublayers)
    stacks = [np.asarray(leaf) for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert any(stack.ndim == 4 for stack in stacks)
    kernels = [kernel.tobytes() for stack in stacks for kernel in stack.reshape(-1, *stack.shape[-2:])]
    assert len(set(kernels)) == len(kernels)


@pytest.fixture(scope="module")
def passes(model):
    def scanned(model):
        return objective(*model.with_reports(TOKENS, SEGMENTS, POSITIONS))

    return jax.jit(lambda m: (m.with_reports(TOKENS, SEGMENTS, POSITIONS), jax.grad(scanned)(m)))(model)


@pytest.fixture(scope="module")
def plain(model):
    return jax.jit(unrolled)(model, TOKENS, SEGMENTS, POSITIONS)


def test_the_scan_is_the_plain_loop(plain, passes):
    (logits, _), _ = passes
    assert worst(logits, plain.logits) < 1e-5


def test_every_parameter_learns_but_the_score_corrections(passes):
    _, gradients = passes
    gradients.sublayers["moe"].correction_bias[...] += 1
    for stack in jax.tree.leaves(gradients.sublayers):
        assert np.abs(np.asarray(stack)).reshape(len(stack), -1).max(1).min() > 0
    np.testing.assert_array_equal(gradients.sublayers["moe"].correction_bias[...], 1)


def test_reports_stand_in_layer_order(model, plain, passes):
    """As a loop over the layers collects them; padding counts nowhere."""
    (_, reports), _ = passes
    context = model.context(TOKENS, SEGMENTS, POSITIONS)
    at = [i for i, kind in enumerate(model.plan()) if kind == "moe"]
    layers = [jax.tree.map(lambda stack, slot=slot: stack[slot], model.sublayers["moe"]) for slot in range(4)]
    run = jax.jit(lambda layer, h: layer(h, context)[1])
    expected = [run(layer, plain.inputs[i]) for layer, i in zip(layers, at, strict=True)]
    assert worst(reports, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)) < 1e-5
    np.testing.assert_array_equal(reports.tokens, 38)
    np.testing.assert_allclose(reports.load.sum(1), 1, rtol=1e-6)
    assert worst(reports.load[0], reports.load[1]) > 0.01


def test_packed_documents_do_not_see_each_other(model):
    packed = jax.jit(lambda m: m(TOKENS, SEGMENTS, POSITIONS))(model)
    alone = jax.jit(lambda m: m(TOKENS[:1, 7:18]))(model)
    assert worst(packed[:1, 7:18], alone) < 2e-5


def test_zero_queries_are_the_residual_baseline():
    logits = [
        jax.jit(lambda m: m(TOKENS, SEGMENTS, POSITIONS))(make(rule, size, queries=0.0))
        for rule, size in (("residual", 4), ("block", 4), ("full", 2))
    ]
    assert worst(logits[1], logits[0]) < 1e-5 and worst(logits[2], logits[0]) < 1e-5


@pytest.mark.parametrize("attention", ["gqa", "mla", "kda"])
def test_a_half_precision_model_takes_statistics_gates_scores_and_logits_in_float32(attention):
    mla = dataclasses.replace(TINY.mla, query_rank=8, rotary=True)
    moe = dataclasses.replace(TINY.moe, latent_width=8)
    changes = {"attention_layers": attention, "num_kv_heads": 1, "mla": mla, "moe": moe, "activation": "situ"}
    config = dataclasses.replace(TINY, dtype="bfloat16", **changes)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    program = list(equations(jax.make_jaxpr(lambda model, tokens: model(tokens))(model, TOKENS)))
    narrow = [each for each in program if each.invars and each.invars[0].aval.dtype == jnp.bfloat16]
    inexact = {"exp", "log", "log1p", "logistic", "tanh", "rsqrt", "sqrt", "div", "reduce_sum", "reduce_max"}
    assert not {each.primitive.name for each in narrow} & inexact
    products = [each.outvars[0].aval for each in narrow if each.primitive.name == "dot_general"]
    wanted = {"logits": lambda shape: shape[-1] == 61, "scores": lambda shape: shape.count(20) == 2}
    for name, is_one in wanted.items():
        dtypes = {out.dtype for out in products if is_one(out.shape)}
        assert dtypes == (set() if (name, attention) == ("scores", "kda") else {jnp.dtype("float32")}), name


def test_a_model_without_experts_has_no_reports():
    model = jax.eval_shape(lambda: make("block", 4, mlp_layers="swiglu"))
    assert jax.eval_shape(lambda model: model.with_reports(TOKENS), model)[1] is None


def test_rotary_latent_attention_depends_on_positions():
    mla = dataclasses.replace(TINY.mla, rotary=True, rotary_interleaved=True)
    model = make("block", 4, attention_layers="mla", mla=mla)
    run, count = jax.jit(lambda m, positions: m(TOKENS, None, positions)), jnp.tile(jnp.arange(20), (2, 1))
    shifted, stretched = run(model, count + jnp.array([[5], [9]])), run(model, 2 * count)
    plain = jax.jit(lambda m: m(TOKENS))(model)
    assert worst(shifted, plain) < 1e-4 < 1e-2 < worst(stretched, plain)


def test_kimi_k3_is_a_handful_of_segments():
    """93 layers, 69 KDA and 24 MLA, in blocks of 12 layers: printed, and the parts add up."""
    config = ModelConfig(
        attention_layers=",".join(["kda*3,mla"] * 23 + ["mla"]),
        mlp_layers="swiglu,moe*",
        num_layers=93,
        depth=DepthConfig(rule="block", block_size=24),
    )
    plan = jax.eval_shape(lambda: build_model(dataclasses.replace(TINY, **_plan_of(config)), rngs=nnx.Rngs(0))).plan()
    segments = cut(plan, 24)
    for segment in segments:
        print(f"{len(segment.slots)} x {' '.join(segment.kinds)}")
    assert [len(segment.slots) for segment in segments] == [1, 6, 1]
    assert plan.count("kda") == 69 and plan.count("mla") == 24 and plan.count("moe") == 92
    together = [
        (kind, slot)
        for segment in segments
        for block in segment.slots.tolist()
        for kind, slot in zip(segment.kinds, block, strict=True)
    ]
    assert together == list(zip(plan, slots_of(plan), strict=True))


def _plan_of(config):
    return {key: getattr(config, key) for key in ("attention_layers", "mlp_layers", "num_layers", "depth")}
