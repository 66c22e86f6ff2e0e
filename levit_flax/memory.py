"""What the process does with memory that has been freed."""

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step instead of handing it back to the system.

    On a CPU, XLA asks for the whole working memory of a step anew each time, and the system clears every page of it: a
    fifth of the time of levit-128S with 32 pictures (benchmarks/README.md). The command `levit-flax finetune` calls
    this. Other programs may, first of all: it has to come before anything that starts threads, as importing NumPy and
    JAX does. It holds for the whole process, whose memory then never shrinks below its peak.

    Returns:
        Whether it was done: only glibc, Linux's usual C library, has these settings.

    Example:
        >>> done = keep_freed_memory()  # and then import numpy, jax and the rest

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # One heap for all threads, grown for blocks of any size, and never shrunk.
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    return all(mallopt(parameter, value) for parameter, value in settings.items())
