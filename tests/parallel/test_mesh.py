"""Meshes: their sizes, what is impossible in one line, what crosses hosts, and where parameters lie."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_runs import ROOT

from attnres_jax.axes import constrain, partition
from attnres_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    PipelineConfig,
    TrainingConfig,
    load_config,
)
from attnres_jax.errors import ConfigError
from attnres_jax.models import Decoder, named_leaves
from attnres_jax.parallel import AXES, TABLE, abstract_mesh, make_mesh, mesh_sizes, with_shardings
from attnres_jax.parallel.mesh import across, device_array, mesh_that_fits
from attnres_jax.parallel.sharding import logical_axes
from attnres_jax.parallel.show import default_devices, placement

TINY = str(ROOT / "configs/tiny.py")
MOE = ModelConfig(mlp_layers="moe", moe=MoEConfig(num_experts=6, expert_width=64))


def config_of(model=None, batch=8, length=64, accumulation=1, **sizes):
    return Config(
        model=model or ModelConfig(),
        data=DataConfig(batch_size=batch, sequence_length=length),
        training=TrainingConfig(accumulation=accumulation),
        mesh=MeshConfig(**sizes),
    )


def test_the_default_is_data_parallelism_over_whatever_there_is():
    assert mesh_sizes(Config(), 1) == dict.fromkeys(AXES, 1)
    assert mesh_sizes(Config(), 8) == {**dict.fromkeys(AXES, 1), "data": 8}
    assert mesh_sizes(config_of(fsdp=2, tensor=4), 8)["data"] == 1
    assert mesh_sizes(config_of(data=2, context=-1), 8)["context"] == 4
    mesh = make_mesh(Config())
    assert mesh.axis_names == AXES and mesh.size == 1 == mesh_that_fits(config_of(fsdp=16)).size


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (config_of(fsdp=3), 8, "mesh.fsdp=3 does not fit: the mesh data=-1 * fsdp=3 does not come to 8 devices"),
        (config_of(fsdp=3), 8, "nearest: mesh.fsdp=4"),
        (config_of(data=2, fsdp=2), 8, "does not come to 8 devices; nearest: mesh.data=4"),
        (config_of(fsdp=16), 1, "does not come to 1 device; nearest: mesh.fsdp=1"),
        (config_of(tensor=8), 8, "mesh.tensor=8 does not divide model.num_heads=4; nearest: mesh.tensor=4"),
        (
            config_of(ModelConfig(num_kv_heads=2), tensor=4),
            4,
            "mesh.tensor=4 does not divide model.num_kv_heads=2; nearest: mesh.tensor=2",
        ),
        (config_of(MOE, expert=4), 4, "mesh.expert=4 does not divide model.moe.num_experts=6; nearest: mesh.expert=2"),
        (config_of(expert=2), 2, "mesh.expert=2: model.mlp_layers='swiglu' has no experts to split"),
        (config_of(context=8, length=36), 8, "mesh.context=8 does not divide data.sequence_length=36; nearest: mesh"),
        (config_of(batch=6), 4, "data.batch_size=6 does not divide over mesh.data=4 * mesh.fsdp=1 * mesh.expert=1"),
        (config_of(batch=6), 4, "data.batch_size=8 would"),
        (config_of(accumulation=4, data=2, fsdp=2), 4, "4 micro-batches; data.batch_size=16 would"),
        (config_of(batch=8), 7, "no mesh of 7 devices works; nearest: 4 devices"),
        (
            config_of(ModelConfig(num_layers=3), stage=4),
            4,
            "mesh.stage=4: 3 layers in 4 runs of 1 leave the last without",
        ),
        (
            config_of(ModelConfig(vocab_size=4099), stage=2),
            2,
            "mesh.stage=2 does not divide model.vocab_size=4099; nearest",
        ),
        (
            dataclasses.replace(config_of(stage=2), pipeline=PipelineConfig(schedule="interleaved_1f1b")),
            2,
            "nothing to interleave; nearest: virtual_stages=2, or mesh.stage=1",
        ),
    ],
)
def test_an_impossible_mesh_is_one_line_with_the_way_out(config, devices, message):
    with pytest.raises(ConfigError) as error:
        mesh_sizes(config, devices)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("mesh.fsdp=-1", "mesh.fsdp=-1: mesh.data is -1 too"),
        ("mesh.fsdp=0", "mesh.fsdp=0 must be positive, or -1"),
        ("mesh.tensr=2", "did you mean 'mesh.tensor'?"),
    ],
)
def test_impossible_on_any_devices(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


def fake_devices(processes, each, slices=1):
    count = processes * each
    return [FakeDevice(i, i // each, i * slices // count) for i in range(count)]


def test_the_first_axes_cross_hosts():
    sizes = {**dict.fromkeys(AXES, 1), "data": 2, "fsdp": 4, "tensor": 2}
    inner, outer = across(sizes, 4)
    assert (outer["data"], outer["fsdp"], outer["tensor"]) == (2, 2, 1)
    assert all(inner[axis] * outer[axis] == sizes[axis] for axis in AXES)
    for devices in (fake_devices(4, 4), fake_devices(4, 4, slices=4)):
        array = device_array(sizes, devices)
        host = np.vectorize(lambda device: device.process_index)(array).reshape(2, 4, 2)
        assert (host[..., 0] == host[..., 1]).all()  # tensor stays inside
        assert (host[:, 0] == host[:, 1]).all() and len(np.unique(host[:, ::2])) == 4


@dataclasses.dataclass(frozen=True)
class FakeChip(FakeDevice):
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def test_chips_of_one_slice_are_laid_out_by_their_torus_whatever_their_hosts():
    """A slice of 4 x 4 chips, 2 x 2 of them on a host: an axis of four is a ring through two hosts, and no host."""
    chips = [FakeChip(4 * x + y, x // 2 * 2 + y // 2, 0, "tpu", "fake", (x, y, 0)) for x in range(4) for y in range(4)]
    array = device_array({**dict.fromkeys(AXES, 1), "fsdp": 4, "tensor": 4}, chips).reshape(4, 4)
    for lines in (array, array.T):
        for line in lines:
            assert sorted(len({chip.coords[axis] for chip in line}) for axis in (0, 1)) == [1, 4]
            assert len({chip.process_index for chip in line}) == 2


def test_what_does_not_divide_stays_whole():
    sizes = {"data": 2, "fsdp": 2, "context": 2, "tensor": 2}
    assert partition((8, 8, 5), ("batch", "sequence", None), sizes, TABLE) == P(
        ("data", "fsdp"), ("context", "tensor"), None
    )
    assert partition((2, 6, 5), ("batch", "sequence", "heads"), sizes, TABLE) == P("data", "context", None)
    assert partition((4, 4), ("rank", "width"), sizes, TABLE) == P("fsdp", None)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "sequence") is x
    assert "sharding" not in jax.jit(lambda x: constrain(x, "batch", None)).lower(x).as_text()


@pytest.mark.parametrize("path", ["configs/tiny.py", "configs/tiny_kimi.py", "configs/kimi_linear_48b.py"])
def test_every_large_parameter_is_split(path):
    """The logical axes of every matrix are known: a kind of sublayer whose parameters are not would be whole."""
    model = load_config(str(ROOT / path)).model
    for name, leaf in named_leaves(jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))).items():
        axes = logical_axes(name, leaf.ndim)
        assert any(axes) == (name.rpartition(".")[2] in ("kernel", "table", "taps", "log_rate", "decay_bias")), name
        assert axes == logical_axes(f"opt_state.1.0.mu.{name}", leaf.ndim)


def test_kimi_linear_over_many_devices():
    """48B parameters on 256 devices: a 256th each, but for norms and what is of the depth rule."""
    config = load_config(str(ROOT / "configs/kimi_linear_48b.py"))
    data, training = dataclasses.replace(config.data, batch_size=256), TrainingConfig()
    config = dataclasses.replace(config, data=data, training=training, mesh=MeshConfig(fsdp=8, expert=16, tensor=2))
    mesh = abstract_mesh(config, 256)
    model = with_shardings(mesh, jax.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))))
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    own = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(model))
    assert whole > 48e9 and own < 1.05 * whole / 256


def test_the_placement_is_printed_with_bytes():
    text = placement(config_of(fsdp=2, tensor=2), 8)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "data=2, fsdp=2, stage=1, expert=1, context=1, tensor=2" in text
    assert "-, width, heads" in lines["sublayers.gqa.query.kernel"] and "-, fsdp, tensor" in text
    assert lines["sublayers.gqa.query.kernel"].endswith(f"{8 * 128 * 128 * 4 // 4:,}")
    assert lines["sites.query"].endswith(f"{17 * 128 * 4:,}")
    assert "A device has 2 x 64 tokens" in text


def test_the_placement_is_on_the_devices_that_are_here_or_on_the_fewest_that_make_up_the_mesh():
    numbers = [
        default_devices(config_of(**axes), here)
        for axes, here in (({}, 1), ({}, 8), ({"fsdp": 4}, 8), ({"fsdp": 4}, 1), ({"data": 1, "fsdp": 4}, 8))
    ]
    assert numbers == [1, 8, 8, 4, 4]


def test_the_command():
    command = [sys.executable, "-m", "attnres_jax.parallel.show", f"--config={TINY}"]
    run = subprocess.run([*command, "--config.mesh.fsdp=4", "--devices=4"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "embedding.table" in run.stdout, run.stderr
    run = subprocess.run([*command, "--config.mesh.fsdp=3", "--devices=4"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "nearest: mesh.fsdp=" in run.stderr
