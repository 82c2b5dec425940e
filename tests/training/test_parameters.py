"""Groups, norms and the printed table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax.config import DepthConfig, ModelConfig, OptimizerConfig
from attnres_jax.models import Decoder
from attnres_jax.training.parameters import (
    count_parameters,
    group_norms,
    named_leaves,
    parameter_group,
    parameter_table,
)


def shapes(**settings):
    config = ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=12, **settings)
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def test_every_parameter_has_a_group_and_the_groups_are_these():
    groups = {parameter_group(name) for name in named_leaves(shapes(tie_embeddings=False))}
    depth = {"depth_queries", "depth_key_scales"}
    assert groups == {"embedding", "head", "attention", "mlp", "norms"} | depth
    residual = {parameter_group(name) for name in named_leaves(shapes(depth=DepthConfig(rule="residual")))}
    assert residual <= groups - {"head"}


def test_query_and_key_norms_are_norms_and_a_stranger_is_refused():
    assert parameter_group("sublayers.gqa.query_norm.scale") == "norms"
    assert parameter_group("sublayers.gqa.query.kernel") == "attention"
    assert parameter_group("sites.streams.kernel") == "depth_other"
    assert {parameter_group(f"sites.{name}") for name in ("query_projection", "source_logit")} == {"depth_queries"}
    with pytest.raises(ValueError, match=r"router\.kernel"):
        parameter_group("router.kernel")


def test_group_norms_are_euclidean_over_the_group():
    tree = {"sublayers": {"gqa": {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([[4.0]])}}}}
    tree |= {"embedding": {"table": jnp.array([2.0], jnp.bfloat16)}}
    norms = group_norms("grad_norm", tree)
    assert {key: float(value) for key, value in norms.items()} == {
        "grad_norm/attention": 5.0,
        "grad_norm/embedding": 2.0,
    }
    assert all(value.dtype == np.float32 for value in norms.values())


def test_table_names_shapes_counts_and_decay():
    model = shapes()
    lines = parameter_table(model, OptimizerConfig(depth_query_lr_multiplier=0.5)).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines}
    assert lines[0].split() == ["parameter", "group", "shape", "count", "decay", "lr"]
    assert rows["sublayers.swiglu.up.kernel"][0].split() == ["mlp", "2", "x", "8", "x", "12", "192", "0.1", "x1"]
    assert rows["sublayers.gqa.norm.scale"][0].split() == ["norms", "2", "x", "8", "16", "0", "x1"]
    assert rows["sites.query"][0].split()[-2:] == ["0", "x0.5"]
    assert rows["total"] == [f"{count_parameters(model):,}"]
    assert count_parameters(model) == sum(int(line.split()[-3].replace(",", "")) for line in lines[1:-1])


def test_table_says_which_settings_change_nothing():
    settings = OptimizerConfig(depth_key_scale_lr_multiplier=2.0, depth_weight_decay=0.1)
    assert parameter_table(shapes(), settings).splitlines()[-1].startswith("total")
    *_, total, note = parameter_table({"embedding": {"table": jnp.zeros((3, 2))}}, settings).splitlines()
    assert total.startswith("total")
    assert note == "optimizer.depth_key_scale_lr_multiplier=2 changes nothing: the model has no depth_key_scales"
