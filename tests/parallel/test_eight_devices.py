"""Runs what needs eight simulated devices in processes of its own: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["eight_devices.py", "expert_devices.py"])
def test_on_eight_devices(name):
    tests = Path(__file__).with_name(name)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-20_000:], run.stderr[-5_000:])
    assert run.returncode == 0
