"""Compilation of the step: the persistent cache, and what compiling took."""

import time
from typing import Any

import jax

from attnres_jax.config import DataConfig
from attnres_jax.data import cache_dir


def enable_compilation_cache(config: DataConfig) -> None:
    """Keeps compiled programs on disk, so that resuming a run is quick; a directory that is set already stays."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir(config) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def compile_step(step: Any, *arguments: Any) -> tuple[Any, float]:
    """Compiles a jitted function for these arguments (shapes suffice): (the program, seconds).

    A program read from the persistent cache counts with the seconds that compiling it took when it was stored, so that
    the figure means the same in every run.
    """
    saved: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/compilation_cache/compile_time_saved_sec":
            saved.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    started = time.perf_counter()
    try:
        compiled = step.lower(*arguments).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return compiled, time.perf_counter() - started + sum(saved)


def program_bytes(compiled: Any) -> int:
    """Device memory that the program needs at its peak: arguments, results and temporaries, shared buffers once."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
