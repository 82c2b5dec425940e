"""Runs `eight_devices.py` in a process with eight simulated devices: their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    tests = Path(__file__).with_name("eight_devices.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-20_000:], run.stderr[-5_000:])
    assert run.returncode == 0
