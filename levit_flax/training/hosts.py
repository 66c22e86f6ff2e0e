"""Run checks on all hosts of a training run together.

If one host fails, all hosts raise, so that none waits for the failed one.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from .recipe import RecipeError

_T = TypeVar("_T")


def _run_on_hosts(work: Callable[[], _T], only_first: bool = False) -> _T:
    """Call `work` on every host and return its result, or raise on all hosts if it fails on one.

    With `only_first`, call it on host 0 only, while the others wait and return None.
    """
    error, result = None, None
    if not only_first or jax.process_index() == 0:
        try:
            result = work()
        except (ValueError, OSError, ImportError) as caught:
            error = caught
    failed = [error is not None]
    if jax.process_count() > 1:
        failed = list(multihost_utils.process_allgather(np.array(failed)).ravel())
    if error:
        raise error
    if any(failed):
        raise OSError(f"Host {failed.index(True)} cannot start training. See its output for the reason.")
    return cast(_T, result)


def _check_hosts_agree(settings: Any) -> None:
    """Raise RecipeError unless all hosts have the same JSON-ready settings."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (digests != digests[0]).any():
        raise RecipeError(
            "The hosts have different settings or see different images: expected the same command, and the same data at"
            f" the same path, on all {jax.process_count()} hosts."
        )
