"""Splash attention compiled ahead of time for TPU chips, in whole training steps and on every axis of the mesh."""

import re

import pytest
from small_runs import ROOT
from tpu_compiler import needs_libtpu, run_python

PROGRAM = f"""
import sys
from attnres_jax.config import load_config
from attnres_jax.parallel import make_mesh
from attnres_jax.parallel.ahead import lower_step
from attnres_jax.parallel.chips import slice_devices

devices, _ = slice_devices("v5p:2x2x1")
config = load_config({str(ROOT / "configs")!r} + "/" + sys.argv[1], sys.argv[2:])
print(lower_step(config, make_mesh(config, devices)).compile().as_text())
"""
SMALL = ["data.sequence_length=1024", "model.max_length=1024", "data.batch_size=4"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "config, changes",
    [
        ("tiny.py", ["mesh.context=2", "mesh.tensor=2"]),
        ("tiny.py", ["mesh.stage=2", "mesh.fsdp=2", "training.accumulation=2"]),
        ("tiny_kimi.py", ["mesh.fsdp=2", "mesh.tensor=2"]),
    ],
)
def test_no_device_holds_a_score_for_every_pair_of_tokens(config, changes):
    run = run_python("-c", PROGRAM, config, *SMALL, *changes)
    assert run.returncode == 0 and "tpu_custom_call" in run.stdout
    scores = set(re.findall(r"\b\w+\[(?:\d+,)*(?:512|1024),1024\]", run.stdout))
    assert not {shape for shape in scores if shape.startswith(("f32", "bf16"))}, scores
