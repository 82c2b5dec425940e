"""A plan for a TPU slice: its arithmetic on cases known by hand, its errors, and real compilations where libtpu is."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx
from small_runs import ROOT
from tpu_compiler import needs_libtpu, run_python

from attnres_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_config
from attnres_jax.errors import ConfigError
from attnres_jax.models import Decoder
from attnres_jax.parallel import abstract_mesh, chips, make_mesh, plan
from attnres_jax.parallel.ahead import DUMPS, CompilationError, Program, _read, allotted, lower_step
from attnres_jax.parallel.chips import CHIPS, slice_devices
from attnres_jax.parallel.collectives import Traffic
from attnres_jax.training import training_flops_per_token
from attnres_jax.training.checkpoints import abstract_state

TINY = str(ROOT / "configs/tiny.py")
V5P = CHIPS["TPU v5"]
BUFFERS = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <101 add.480 @0> (size=512,offset=0): f32[]
allocation 1: size 4096, page 0, parameter 3, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 256, page 0, maybe-live-out:
allocation 3: size 9000, color 1, page 0, preallocated-temp:
allocation 4: size 70000, page 0, preallocated-temp:
"""


def shapes_of(**changes):
    model = ModelConfig(**changes)
    return jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p", "--topology=v5p is not a TPU slice, which is written like v5p:4x4x4"),
        ("v5p:4", "is not a TPU slice"),
        ("v5p:4x4x4x4", "is not a TPU slice"),
    ],
)
def test_a_slice_that_is_none(name, message):
    with pytest.raises(ConfigError, match=message):
        slice_devices(name)


@pytest.mark.parametrize(
    "error, message",
    [
        (
            RuntimeError("JAX TPU support not installed; cannot generate TPU topology."),
            "pip install 'attnres_jax\\[tpu\\]'",
        ),
        (ValueError("INVALID_ARGUMENT:\n Invalid TPU external name"), "v9:2x2: INVALID_ARGUMENT: Invalid TPU external"),
    ],
)
def test_a_slice_that_cannot_be_had_is_one_line(monkeypatch, error, message):
    def refuse(**_):
        raise error

    monkeypatch.setattr(chips.topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=message) as raised:
        slice_devices("v9:2x2")
    assert "\n" not in str(raised.value)


def test_a_chip_of_unknown_rates(monkeypatch):
    class Topology:
        devices = jax.devices()

    monkeypatch.setattr(chips.topologies, "get_topology_desc", lambda **_: Topology)
    with pytest.raises(ConfigError, match="the rates of cpu are not known; v5p, v5e and v6e are"):
        slice_devices("v4:2x2x1")


def test_the_command_without_a_slice():
    command = [sys.executable, "-m", "attnres_jax.parallel.plan", f"--config={TINY}", "--topology=v5p"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--topology=v5p is not" in run.stderr


def test_memory_is_that_of_the_chip_alone():
    assert allotted(BUFFERS) == (4096, 4096 + 256 + 70000)


@pytest.mark.parametrize(
    "error, buffers, message",
    [
        ("INTERNAL:\n why", True, "the TPU compiler failed: INTERNAL: why"),
        ("Ran out of memory", False, "the TPU compiler failed: Ran out of memory"),
        (None, False, "the TPU compiler failed: exit code -9"),
    ],
)
def test_a_compiler_that_fails_is_one_line(tmp_path, error, buffers, message):
    if error:
        (tmp_path / "error").write_text(error)
    if buffers:
        (tmp_path / f"m.jit_step.x.{DUMPS['buffers']}").write_text(BUFFERS)
    with pytest.raises(CompilationError, match=message) as raised:
        _read(tmp_path, -9, 1.0)
    assert "\n" not in str(raised.value)


def test_a_program_too_large_for_the_chip_is_read_all_the_same(tmp_path):
    (tmp_path / "error").write_text("Ran out of memory on HBM")
    (tmp_path / f"m.jit_step.x.{DUMPS['buffers']}").write_text(BUFFERS)
    assert _read(tmp_path, 1, 3.0) == Program(4096, 4096 + 256 + 70000, None, "", 3.0)


def test_the_bank_of_a_device():
    """Of 8 x 64 tokens a device has 2 x 32; the embedding and all of four blocks but the last; 17 logits and an RMS."""
    model = shapes_of(num_layers=8, width=128)
    mesh = abstract_mesh(Config(data=DataConfig(sequence_length=64), mesh=MeshConfig(data=4, context=2)), 8)
    assert plan.bank_bytes(model, mesh, 8, 64) == (4, 4 * 2 * 32 * (128 + 17 + 1) * 4)
    stream = shapes_of(num_layers=8, width=128, depth=dataclasses.replace(ModelConfig().depth, rule="residual"))
    assert plan.bank_bytes(stream, mesh, 8, 64) == (0, 0)


def test_what_is_saved_depends_on_recomputation():
    config = load_config(TINY, ["data.sequence_length=64"])
    tokens = config.data.batch_size * 64
    logits, bank = tokens * config.model.vocab_size * 4, 5 * tokens * config.model.width * 4
    saved = {}
    for remat in ("none", "full"):
        model = dataclasses.replace(config.model, remat=remat)
        changed = dataclasses.replace(config, model=model)
        saved[remat] = plan.saved_bytes(changed, jax.eval_shape(lambda m=model: Decoder(m, rngs=nnx.Rngs(0))))
    assert logits + bank < saved["full"] < 1.5 * (logits + bank) < saved["none"]


def test_a_plan_adds_up(monkeypatch):
    """On one device everything is known: twelve bytes a parameter, and times that follow from the rates."""
    config = load_config(TINY, ["model.dtype=bfloat16", "model.remat=full", "training.accumulation=2"])
    program = Program(10**8, 5 * 10**8, None, "ENTRY %m () -> () {\n}", 1.0)
    monkeypatch.setattr(plan, "slice_devices", lambda name: (jax.devices()[:1], V5P))
    monkeypatch.setattr(plan, "compile_step", lambda config, name, code: program)
    monkeypatch.setattr(plan, "peak_flops", lambda devices: 459e12)
    made = plan.make_plan(config, "v5p:1x1")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(config).model))
    assert made.memory["parameters"] == made.memory["gradients"] == 4 * parameters
    assert 0 <= made.memory["optimizer"] - 8 * parameters < 100
    assert sum(made.memory.values()) == program.total_bytes and min(made.memory.values()) >= 0
    tokens = config.data.batch_size * config.data.sequence_length
    useful = tokens * training_flops_per_token(config.model, config.data.sequence_length) / 459e12
    assert made.useful_seconds == useful < made.compute_seconds < 4 / 3 * useful
    # Each micro-batch: weights in bfloat16 three times, gradients added up; then the update.
    moved = 2 * (3 * 2 + 3 * 4) + 2 * (4 + 8)
    assert made.hbm_seconds == pytest.approx(moved * parameters / V5P.hbm_rate, rel=1e-3)
    assert made.collectives == [] and made.ici_seconds == 0
    assert made.seconds == max(made.compute_seconds, made.hbm_seconds)
    assert made.utilisation == useful / made.seconds


@pytest.mark.parametrize("total, code, fits", [(90e9, None, True), (90.3e9, None, False), (89e9, 2e9, False)])
def test_a_twentieth_of_the_memory_is_left(total, code, fits):
    assert known_plan(int(total), code).fits(V5P) == fits


def test_the_table_names_everything():
    config = load_config(TINY)
    text = plan.show([known_plan(90 * 10**9), known_plan(10**9)], config, make_mesh(config), "v5p:1x1", V5P)
    lines = {line[:44].strip(): line[44:].split() for line in text.splitlines()}
    assert lines["fits in 95 GB"] == ["yes", "yes"] and lines["machine code"][:2] == ["not", "generated"]
    assert lines["fsdp * expert: all-gather"] == ["1.500", "(32)"] * 2
    assert lines["estimate, s"] == ["5.000"] * 2 and lines["estimate, utilisation"] == ["40.0%"] * 2
    assert "unknown length" not in text and "not a measurement" in text
    unread = dataclasses.replace(known_plan(10**9), collectives=None)
    assert "no program to read them from" in plan.show([unread], config, make_mesh(config), "v5p:1x1", V5P)


def known_plan(total, code=None):
    kinds = ("parameters", "optimizer", "batch, padding", "bank", "gradients", "activations", "temporary")
    return plan.Plan(
        name="known",
        program=Program(0, total, code and int(code), "", 1.0),
        memory=dict.fromkeys(kinds, 0),
        sources=5,
        collectives=[Traffic("all-gather", ("fsdp", "expert"), 32, 1_500_000_000)],
        unknown_loops=0,
        flops_per_token=10**9,
        compute_seconds=3.0,
        hbm_seconds=1.0,
        ici_seconds=2.0,
        useful_seconds=2.0,
    )


def test_the_step_is_that_of_training():
    """It takes a state and a batch, and gives the state back with metrics."""
    config = load_config(TINY, ["data.sequence_length=64"])
    lowered = lower_step(config, make_mesh(config))
    state, batch, token_bytes = lowered.args_info[0]
    assert batch["inputs"].shape == (config.data.batch_size, 64) and token_bytes.shape == (config.model.vocab_size,)
    assert jax.tree.structure(lowered.out_info[0]) == jax.tree.structure(state)
    assert {"loss", "grad_norm", "finite"} <= set(lowered.out_info[1])


def run_plan(*arguments):
    """The command."""
    return run_python("-m", "attnres_jax.parallel.plan", *arguments)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, topology",
    [
        ("configs/kimi_linear_48b.py", "v5p:4x4x4"),
        ("configs/scaling.py:size=194m", "v5p:2x2x2"),
    ],
)
def test_flagship_configs_fit(config, topology):
    run = run_plan(f"--config={config}", f"--topology={topology}")
    assert run.returncode == 0 and "fsdp" in run.stdout
    assert re.search(r"fits in 95 GB +yes$", run.stdout, re.MULTILINE), run.stdout
    assert "unknown length" not in run.stdout and "no program" not in run.stdout


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["block", "full"])
def test_what_queries_are_due_is_added_up_over_devices_once_a_block(rule):
    """Not in every turn of the loop over sources, whose number is not known."""
    run = run_plan(f"--config=configs/tiny.py:residual={rule}", "--topology=v5p:2x2x1")
    assert run.returncode == 0 and "data: all-reduce" in run.stdout
    assert "unknown length" not in run.stdout


K3 = """model.width=512 model.num_heads=4 model.kda.num_heads=4 model.mlp_width=1024 model.vocab_size=8192
    model.mla.query_rank=128 model.mla.latent_dim=128 model.moe.num_experts=32 model.moe.experts_per_token=4
    model.moe.expert_width=128 model.moe.latent_width=256 data.sequence_length=2048 data.batch_size=8
    mesh.fsdp=2 mesh.expert=4"""


@needs_libtpu
@pytest.mark.slow
def test_kimi_k3_narrow():
    """All 93 layers of K3 in its three segments, narrow."""
    run = run_plan(
        "--config=configs/preset.py:name=kimi-k3", "--topology=v5p:2x2x2", *(f"--config.{item}" for item in K3.split())
    )
    assert run.returncode == 0 and "expert: all-gather" in run.stdout


@needs_libtpu
@pytest.mark.slow
def test_what_cannot_be_is_one_line():
    for arguments, message in (
        (["--topology=v5p:3x3"], "--topology=v5p:3x3: INVALID_ARGUMENT"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=3"], "mesh.fsdp=3 does not fit"),
    ):
        run = run_plan(f"--config={TINY}", *arguments)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and message in run.stderr


@needs_libtpu
@pytest.mark.slow
def test_experts_are_multiplied_as_on_a_tpu():
    """Not as on the machine that compiles: see `layers/experts.py`."""
    devices, _ = slice_devices("v5p:2x2x1")
    config = load_config(str(ROOT / "configs/tiny_kimi.py"), ["mesh.fsdp=4"])
    assert "ragged_dot" in lower_step(config, make_mesh(config, devices)).as_text()


BOTH = f"""
import json
from attnres_jax.config import load_config
from attnres_jax.parallel import make_mesh
from attnres_jax.parallel.ahead import compile_step, lower_step
from attnres_jax.parallel.chips import slice_devices

config = load_config({TINY!r}, ["mesh.fsdp=4"])
devices, _ = slice_devices("v5p:2x2x1")
memory = lower_step(config, make_mesh(config, devices)).compile().memory_analysis()
results = memory.output_size_in_bytes - memory.alias_size_in_bytes
total = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
program = compile_step(config, "v5p:2x2x1", code=True)
analysis = memory.argument_size_in_bytes, total, memory.generated_code_size_in_bytes
print(json.dumps([analysis, [program.argument_bytes, program.total_bytes, program.code_bytes]]))
"""


@needs_libtpu
@pytest.mark.slow
def test_memory_is_what_the_compiled_program_reports():
    """A small step, with its machine code: the compiler's own analysis gives the same bytes, but for tiny constants."""
    run = run_python("-c", BOTH)
    assert run.returncode == 0
    analysis, read = json.loads(run.stdout.splitlines()[-1])
    assert read == pytest.approx(analysis, rel=5e-3)
