"""Memory of a program that runs on the CPU: freed pages stay with the process."""

import ctypes
import importlib.metadata
import importlib.util

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def retain_host_memory() -> bool:
    """Tells glibc to keep what is freed for the next allocation; whether it did. To be called before JAX runs anything.

    A training step on the CPU backend allocates its temporaries anew, and by default glibc takes them from the kernel
    and gives them back every time: gigabytes of page faults a step. The process then holds its peak until it ends,
    and more with several simulated devices, whose arrays may take some steps to find places that fit.
    Nothing is changed where JAX may find an accelerator, nor with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not _cpu_only():
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)))


def _cpu_only() -> bool:
    """Whether JAX has no other backend to choose, without starting one."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None
