"""Strictness for every test: warnings are errors (pyproject.toml), ranks and types are never promoted in silence."""

import os
import socket
from urllib.parse import urlsplit

import jax
import pytest

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests of training relax this: optax needs the standard rules.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def _skip_without_network(request):
    if request.node.get_closest_marker("network"):
        try:
            socket.create_connection((urlsplit(HUB).hostname, 443), timeout=3).close()
        except OSError as error:
            pytest.skip(f"no network: {HUB} does not answer ({error})")
