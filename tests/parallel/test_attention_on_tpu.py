"""Splash attention compiled ahead of time for TPU chips, in whole training steps and on every axis of the mesh."""

import re

import pytest
from small_runs import ROOT
from tpu_compiler import needs_libtpu, run_python

PROGRAM = f"""
import sys
from attnres_jax.config import load_config
from attnres_jax.parallel.ahead import compile_step

config = load_config({str(ROOT / "configs")!r} + "/" + sys.argv[1], sys.argv[2:])
print(compile_step(config, "v5p:2x2x1").text)
"""
SMALL = ["data.sequence_length=1024", "model.max_length=1024", "data.batch_size=4", "model.vocab_size=3072"]


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
    assert not set(re.findall(r"\b(?:f32|bf16)\[(?:\d+,)*(?:512|1024),1024\]", run.stdout))
