"""A compiler that does not optimize and keeps its output: tiny models run no faster for being optimized."""

import contextlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_compilation_cache_max_size": 2**32,  # with a limit, JAX locks the directory, which processes share
}


@contextlib.contextmanager
def quick_compiler(directory: Path):
    """Compile quickly in this process, with a directory as the cache."""
    settings = {**SETTINGS, "jax_compilation_cache_dir": str(directory)}
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
