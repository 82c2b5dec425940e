"""Freed memory stays with a process that runs on the CPU, and only there."""

import subprocess
import sys

import pytest

from attnres_jax.training import retain_host_memory

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from attnres_jax.training import retain_host_memory
if sys.argv[1] == "keep":
    assert retain_host_memory()
@jax.jit
def work(x):
    table = jax.lax.optimization_barrier(jnp.outer(x, x))
    return table.sum(0) @ table.sum(1)
x = jnp.arange(4000.0)
for _ in range(10):
    work(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_no_page_is_faulted_in_twice():
    """Twenty runs with 64 MB of temporaries: by default each faults them in; kept, few do."""

    def faults(mode):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < 0.5 * faults("default")


def test_other_backends_are_left_alone(monkeypatch):
    monkeypatch.setattr("attnres_jax.training.host_memory._cpu_only", lambda: False)
    assert retain_host_memory() is False
