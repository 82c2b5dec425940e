"""Programs that compile for TPU chips, with the tpu extra and no TPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
from small_runs import ROOT

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install 'attnres_jax[tpu]'")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user would: without the tests' XLA flags, which libtpu does not know, and within ten minutes."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    print(run.stdout, run.stderr)
    return run
