"""Keep the memory that a process frees, which speeds up computation on CPU."""

import ctypes
import sys

import jax

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory instead of returning it to the system.

    On CPU, XLA allocates new working memory for every call, and the system clears each page of it. For levit-128S,
    this takes about a sixth of the time of training, and up to a quarter of that of inference (benchmarks/README.md).
    The commands `finetune`, `evaluate` and `classify` call this function.

    Call it before JAX computes anything, and compute in the main thread. It applies to the whole process: the memory of
    the process never shrinks below its peak, and a jitted function returns only after the CPU has computed the result.

    Returns:
        Whether the memory is kept: False if the C library is not glibc, because only glibc has these settings.

    Examples:
        >>> kept = keep_freed_memory()

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Allocate blocks of any size on the heap, and never shrink it.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    if mallopt is None or not all(mallopt(parameter, value) for parameter, value in settings.items()):
        return False
    # Compute in the main thread, because the heaps of other threads are limited to 64 MB. With a single heap for all
    # threads, they wait for each other once compilation has fragmented it (benchmarks/README.md).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
