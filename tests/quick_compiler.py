"""Compilers that keep their output, and one that does not optimize: tiny models run no faster for being optimized."""

import contextlib
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


@contextlib.contextmanager
def quick_compiler(directory: Path):
    """Compile quickly in this process, with a directory as the cache."""
    with caching_compiler(directory, **SETTINGS):
        yield


@contextlib.contextmanager
def caching_compiler(directory: Path, **settings: Any):
    """Keep compiled programs in a directory, and change other settings of JAX."""
    settings = {**settings, "jax_compilation_cache_dir": str(directory)}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def compiler_environment(directory: Path) -> dict[str, str]:
    """Return the environment variables that configure another process in the same way."""
    settings = {name.upper(): str(value) for name, value in SETTINGS.items()}
    return {**settings, "JAX_COMPILATION_CACHE_DIR": str(directory)}
