# ruff: noqa: E402
"""Shared by all tests: shapes are checked at run time, and compiled programs are kept between runs."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little: code from XLA's quick settings is exact too, and ready in a third of the time.
# A program in one part instead of one a thread takes a fifth less of the processors, which are busy anyway.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith(
    "0.10."
):  # newer XLA knows the switch no more, and ends at a flag that it does not know
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

install_import_hook("attnres_jax", "beartype.beartype")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Tracing makes millions of objects that stay: by Python's own thresholds a tenth of the time goes to looking at them.
gc.set_threshold(200_000, 20, 50)


def pytest_collection_modifyitems(items):
    """The longest file goes first: a worker takes it whole, and at the end the other would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_eight_devices.py")


@pytest.fixture
def unhooked():
    """Arguments come to the package's own checks, as they do for users: the import hook lets everything through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Programs leave the process with the module that ran them.

    Each maps some pages of its own, and Linux ends a process at its 65,530th map: a thousand tests come near to it.
    """
    yield
    jax.clear_caches()
    gc.collect()
