"""Pipelines against one device, on simulated devices: run in a process of its own by `test_eight_devices.py`.

By itself: JAX_NUM_CPU_DEVICES=8 python -m pytest tests/parallel/pipeline_devices.py [-m "slow or not slow"]
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import T, V, drawn, make_batch, model_of, relative

from attnres_jax.config import Config, DataConfig, DepthConfig, MeshConfig, PipelineConfig, TrainingConfig
from attnres_jax.models import named_leaves
from attnres_jax.parallel import make_mesh, pipeline_gradients, put_batch, use_mesh, with_shardings
from attnres_jax.parallel.ahead import lower_step
from attnres_jax.parallel.collectives import called, parse, reaching
from attnres_jax.training.step import accumulate

TRAINING = TrainingConfig(z_loss=1e-3, router_z_loss=1e-3, router_balance_loss=1e-2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline, and the model that goes through it."""

    kind: str
    rule: str
    layers: int
    block_size: int
    schedule: str
    stages: int
    micros: int
    virtual: int = 1
    transport: str = "cached"
    mesh: tuple[tuple[str, int], ...] = ()
    dtype: str = "float32"

    def __str__(self):
        axes = "".join(f"-{axis}{size}" for axis, size in self.mesh)
        return (
            f"{self.kind}-{self.rule}-{self.layers}x{self.block_size}-{self.schedule}-{self.transport}-"
            f"P{self.stages}V{self.virtual}M{self.micros}{axes}-{self.dtype}"
        )

    @property
    def config(self) -> Config:
        model = dataclasses.replace(
            model_of(self.kind, self.rule),
            num_layers=self.layers,
            dtype=self.dtype,
            remat="full",
            depth=DepthConfig(rule=self.rule, block_size=self.block_size),
        )
        return Config(
            model=model,
            data=DataConfig(batch_size=2 * self.micros, sequence_length=T),
            training=dataclasses.replace(TRAINING, accumulation=self.micros),
            mesh=MeshConfig(**{"data": 1, "stage": self.stages} | dict(self.mesh)),
            pipeline=PipelineConfig(schedule=self.schedule, virtual_stages=self.virtual, transport=self.transport),
        )


TEXT_BYTES = jnp.arange(1.0, V + 1)


@cache
def on_one_device(model, training):
    """(gradients, sums) of the microbatches one after the other."""
    batch = jax.tree.map(jnp.asarray, make_batch(2 * training.accumulation))
    total = jnp.float32(batch["weights"].sum())
    run = jax.jit(lambda made: accumulate(made, batch, TEXT_BYTES, total, training))
    return run(jax.jit(lambda: drawn(model))())


def compiled(config, bubble=0.0):
    """(the pipeline's program, its arguments)."""
    batch = make_batch(config.data.batch_size)
    total = jnp.float32(batch["weights"].sum())
    mesh = make_mesh(config, jax.devices()[: np.prod([max(1, size) for size in dataclasses.astuple(config.mesh)])])
    with use_mesh(mesh):
        shapes = with_shardings(mesh, jax.eval_shape(lambda: drawn(config.model)))
        places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        arguments = jax.jit(lambda: drawn(config.model), out_shardings=places)(), put_batch(mesh, batch)
        run = lambda model, batch: pipeline_gradients(  # noqa: E731
            model, batch, TEXT_BYTES, total, config.training, config.pipeline, bubble=bubble
        )
        return jax.jit(run, out_shardings=(places, None)).lower(*arguments).compile(), arguments


def check(case):
    """Values and gradients, with NaN wherever a stage has nothing to do."""
    config = case.config
    want, want_sums = on_one_device(config.model, config.training)
    program, arguments = compiled(config, bubble=jnp.nan)
    got, sums = program(*arguments)
    errors = {name: relative(leaf, named_leaves(want)[name]) for name, leaf in named_leaves(got).items()}
    exact = case.dtype == "float32"
    assert max(errors.values()) < (1e-5 if exact else 0.1), max(errors.items(), key=lambda item: item[1])
    assert set(sums) == set(want_sums)
    for part, other in zip(jax.tree.leaves(sums), jax.tree.leaves(want_sums), strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5 if exact else 1e-2, atol=1e-6)
    if case.rule in ("block", "full"):  # the first site has a single source
        assert not np.asarray(got.sites.query[0]).any()


FAST = [
    # The embedding's way alone; M is no multiple of P.
    Case("dense", "residual", 4, 2, "1f1b", 2, 3),
    # Within other axes of the mesh, interleaved.
    Case("dense", "block", 4, 2, "interleaved_1f1b", 2, 4, 2, mesh=(("fsdp", 2), ("tensor", 2))),
    # The last stage is shorter; everything travels.
    Case("dense", "full", 7, 4, "gpipe", 4, 5, transport="naive"),
    # A block spans two stages.
    Case("dense", "block", 8, 8, "1f1b", 4, 6),
    # Routers report, experts are spread.
    Case("moe", "block", 4, 2, "1f1b", 2, 2, transport="naive", mesh=(("expert", 2),)),
    # What bfloat16 allows, and XLA on CPU to be compiled at all.
    Case("dense", "block", 2, 2, "1f1b", 2, 2, mesh=(("tensor", 2),), dtype="bfloat16"),
    # Stages whose layers are of different kinds.
    Case("bounded", "block", 3, 2, "1f1b", 2, 2),
]
KIMI = [
    Case("kimi", rule, layers, size, schedule, stages, micros, virtual, transport, mesh)
    for rule, transport in (("residual", "cached"), ("block", "cached"), ("full", "naive"))
    for layers, size, schedule, stages, micros, virtual, mesh in (
        (3, 2, "1f1b", 2, 2, 1, ()),
        (3, 2, "1f1b", 2, 2, 1, (("fsdp", 2), ("tensor", 2))),
        (3, 2, "gpipe", 2, 2, 1, (("expert", 2), ("tensor", 2))),
        (7, 2, "interleaved_1f1b", 2, 2, 2, (("data", 2),)),
        (3, 2, "1f1b", 2, 2, 1, (("context", 2), ("tensor", 2))),
    )
]
OTHERS = [
    Case("dense", rule, 4, 2, "1f1b", 2, 3)
    for rule in ("mhc", "lambdas", "rms_block", "delta", "delta_block", "denseformer", "muddformer")
]
SLOW = [
    *KIMI,
    Case("moe", "full", 4, 2, "1f1b", 2, 2, mesh=(("expert", 2), ("context", 2))),
    *OTHERS,
    *(
        Case("dense", "block", 16, 4, schedule, 4, 8, virtual, transport)
        for schedule, virtual in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2))
        for transport in ("cached", "naive")
    ),
    Case("dense", "block", 8, 16, "interleaved_1f1b", 2, 4, 2),
    Case("dense", "block", 15, 6, "interleaved_1f1b", 4, 8, 2),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_loss_and_gradients_are_those_of_one_device(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_loss_and_gradients_of_more_of_them(case):
    check(case)


def test_a_plan_is_of_the_pipeline_that_is_asked_for():
    config = Case("dense", "block", 4, 2, "interleaved_1f1b", 2, 4, 2).config
    text = lower_step(config, make_mesh(config, jax.devices()[:2])).as_text()
    assert "tensor<12x2xi32>" in text  # what each of two stages does in M V + P V + P - 2 ticks


def test_memory_does_not_grow_with_the_microbatches_and_idle_stages_multiply_nothing():
    cases = [Case("dense", "block", 4, 2, "1f1b", 2, micros) for micros in (4, 32)]
    programs = [compiled(case.config)[0] for case in cases]
    less, more = (program.memory_analysis().temp_size_in_bytes for program in programs)
    tokens = 5 * 28 * 2 * T * 4  # the batch itself: five numbers a token
    assert less - tokens < more < less + 2 * tokens
    # A tick itself has no product: they are in loops of a turn or none and in the head's condition.
    computations, _ = parse(programs[0].as_text())
    products = reaching(computations, lambda i: i.opcode == "dot" or "matmul" in i.rest)
    (tick,) = (
        own for own in computations.values() if any("send_on" in i.rest for i in own if i.opcode == "conditional")
    )
    multiplying = lambda own: [i for i in own if i.opcode == "dot" or any(name in products for name in called(i))]  # noqa: E731
    where = multiplying(tick)
    assert {i.opcode for i in where} == {"while", "conditional"}, where
    # Forward, turning back and backward; what XLA takes out of one of them runs in every tick. The loops in each are
    # logits and blocks, logits and back, blocks alone: logits are known there, and go back with what the blocks read.
    bodies = [own for i in where if i.opcode == "while" for name, own in computations.items() if name in called(i)]
    loops = [sum(i.opcode == "while" for i in multiplying(body)) for body in bodies if multiplying(body)]
    assert loops == [2, 2, 1], loops
