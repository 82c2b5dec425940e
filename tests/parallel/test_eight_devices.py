"""Runs what needs eight simulated devices in processes of its own: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = [(f"{name}_devices.py", "not slow") for name in ("eight", "expert", "pipeline")]
SLOW = [pytest.param(f"{name}_devices.py", "slow", marks=pytest.mark.slow) for name in ("eight", "pipeline")]


@pytest.mark.parametrize("name, marks", [*QUICK, *SLOW])
def test_on_eight_devices(name, marks):
    tests = Path(__file__).with_name(name)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-m", marks, str(tests)]
    limit = 7200 if marks == "slow" else 1800  # seconds: devices that wait for each other would wait for ever
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    print(run.stdout[-20_000:], run.stderr[-5_000:])
    assert run.returncode == 0
