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
from attnres_jax.layers import Llama3Scaling, YarnScaling
from attnres_jax.layers.rotary import rotary_tables
from attnres_jax.models import unrolled
from attnres_jax.models.decoder import rope_scaling
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


def shapes_of(**changes):
    return nnx.eval_shape(lambda: build_model(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0)))


def changed(group, values):
    """A group of settings, every one of which is another than the default."""
    plain = vars(group())
    assert set(values) == set(plain) and all(values[key] != plain[key] for key in plain)
    return group(**values)


def test_every_setting_reaches_its_layer():
    """All other than the defaults, and different from each other."""
    mla = {"latent_dim": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 14, "query_rank": 5, "latent_eps": 3e-5}
    mla |= {"rotary": True, "rotary_interleaved": True, "output_gate": True}
    kda = {"num_heads": 3, "head_dim": 8, "conv_size": 5, "gate_lower_bound": -2.0, "full_rank_gate": True}
    moe = {"num_experts": 6, "experts_per_token": 3, "expert_width": 7, "num_shared": 2, "shared_width": 9}
    moe |= {"router_activation": "softmax", "renormalise": False, "scaling": 1.5, "num_groups": 3, "top_groups": 2}
    moe |= {"correction_bias": False, "biased_weights": True, "latent_width": 11, "latent_norm": False}
    kernels = {"experts": "ragged", "expert_exchange": "routed", "expert_capacity": 2.0, "attention": "xla"}
    groups = {"mla": changed(MLAConfig, mla), "kda": changed(KDAConfig, kda), "moe": changed(MoEConfig, moe)}
    layers = shapes_of(**groups, **kernels, activation="situ").sublayers

    layer, out = layers["mla"], layers["mla"].out.kernel.shape[-2]
    found = {key: getattr(layer, key) for key in ("latent_dim", "nope_dim", "rope_dim", "rotary", "rotary_interleaved")}
    found |= {"value_dim": out / 2, "query_rank": layer.query_down.kernel.shape[-1]}
    found |= {"latent_eps": layer.latent_norm.eps, "output_gate": layer.gate is not None}
    assert found == mla and layer.query_norm.eps == 3e-5 and layer.implementation == "xla"

    layer = layers["kda"]
    found = {key: getattr(layer, key) for key in ("num_heads", "head_dim", "gate_lower_bound")}
    found |= {"conv_size": layer.query_conv.taps.shape[-2], "full_rank_gate": layer.gate is not None}
    assert found == kda

    layer, shared = layers["moe"], layers["moe"].shared.gate.kernel.shape[-1]
    same = ("experts_per_token", "router_activation", "renormalise", "scaling", "num_groups", "top_groups")
    found = {key: getattr(layer, key) for key in (*same, "biased_weights")}
    found |= {"num_experts": layer.router.kernel.shape[-1], "expert_width": layer.gate.kernel.shape[-1]}
    found |= {"num_shared": shared / 9, "shared_width": shared / 2, "latent_width": layer.latent_down.kernel.shape[-1]}
    found |= {key: getattr(layer, key) is not None for key in ("correction_bias", "latent_norm")}
    assert found == moe
    assert (layer.implementation, layer.exchange, layer.capacity) == ("ragged", "routed", 2.0)
    assert layer.activation == layers["swiglu"].activation == layer.shared.activation == "situ"


def test_every_setting_of_rope_scaling_reaches_the_rotation():
    longer = {"factor": 3.0, "original_length": 512}
    llama3 = {"low_frequency_factor": 1.5, "high_frequency_factor": 5.0}
    yarn = {"beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.6}
    scaling = changed(RopeScalingConfig, {"kind": "yarn", **longer, **llama3, **yarn})
    mla = dataclasses.replace(TINY.mla, rope_dim=16, rotary=True)
    for kind, expected in (("llama3", Llama3Scaling(**longer, **llama3)), ("yarn", YarnScaling(**longer, **yarn))):
        model = shapes_of(mla=mla, rope_theta=700.0, rope_scaling=dataclasses.replace(scaling, kind=kind))
        assert rope_scaling(model.config) == expected
        context, positions = model.context(TOKENS), jnp.tile(jnp.arange(20), (2, 1))
        cos, sin = rotary_tables(positions, 16, 700.0, expected)
        assert worst((context.cos, context.sin), (cos, sin)) == 0


def test_yarn_is_for_attention_that_rotates():
    """Else a `rope_scaling` that no layer reads would change what the model computes."""
    scaling = RopeScalingConfig(kind="yarn", factor=40.0, mscale_all_dim=1.0)
    for rotary, expected in ((False, 1), (True, (0.1 * np.log(40) + 1) ** 2)):
        mla = dataclasses.replace(TINY.mla, rotary=rotary)
        layer = shapes_of(mla=mla, rope_scaling=scaling).sublayers["mla"]
        assert layer.scale == pytest.approx(expected * 12**-0.5)


@pytest.fixture(scope="module", params=RULES, ids=str)
def model(request):
    return make(*request.param)


def test_layers_and_experts_are_drawn_independently(model):
    """No two of all layers' and experts' kernels are equal."""
    leaves = jax.tree_util.tree_leaves_with_path(model.sublayers)
    drawn = [leaf for path, leaf in leaves if {"kernel", "taps"} & {getattr(key, "name", None) for key in path}]
    stacks = [np.asarray(leaf) for leaf in drawn]
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
    model = shapes_of(dtype="bfloat16", **changes)
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
