"""Shared by all tests: shapes are checked at run time, and compiled programs are kept between runs."""

from pathlib import Path

import jax
from jaxtyping import install_import_hook

install_import_hook("attnres_jax", "beartype.beartype")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
