"""Runs `pipeline_devices.py` in a process with eight simulated devices: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(marks):
    tests = Path(__file__).with_name("pipeline_devices.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        marks,
        str(tests),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-20_000:], run.stderr[-5_000:])
    assert run.returncode == 0


def test_pipelines_on_eight_devices():
    run("not slow")


@pytest.mark.slow
def test_more_pipelines_on_eight_devices():
    run("slow")
