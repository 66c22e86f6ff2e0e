"""Strict promotion rules for every test; pyproject.toml turns warnings into errors."""

import gc
import os
import socket
from urllib.parse import urlsplit

import jax
import pytest
from quick_compiler import caching_compiler

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests of training relax this: optax needs the standard rules.
jax.config.update("jax_numpy_dtype_promotion", "strict")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores


def pytest_collection_finish():
    """Keep the garbage collector from visiting the objects of the imported libraries again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def compiled_directory(shared):
    return shared / "compiled"


@pytest.fixture(scope="session", autouse=True)
def _keep_compiled_programs(compiled_directory):
    """Compile each program once, also if several workers need it."""
    with caching_compiler(compiled_directory, jax_persistent_cache_min_compile_time_secs=0.05):
        yield


@pytest.fixture(autouse=True)
def _skip_without_network(request):
    if request.node.get_closest_marker("network"):
        try:
            socket.create_connection((urlsplit(HUB).hostname, 443), timeout=3).close()
        except OSError as error:
            pytest.skip(f"no network: {HUB} does not answer ({error})")
