"""What the process does with memory that has been freed."""

import ctypes
import sys

import jax

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for what comes next instead of handing it back to the system.

    On a CPU, XLA asks for the whole working memory of a call anew each time, and the system clears every page of it: a
    sixth of the time that training levit-128S takes with 32 images, and 9 to 24 % of classifying 64
    (benchmarks/README.md). The commands `finetune`, `evaluate` and `classify` call this. Other programs may, before JAX
    computes anything, and compute in their main thread. It holds for the whole process: its memory then never shrinks
    below its peak, and a call of a jitted function returns when the CPU has computed it, not before.

    Returns:
        Whether it was done: only glibc, Linux's usual C library, has these settings.

    Example:
        >>> done = keep_freed_memory()  # and then compute

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Blocks of any size come from the heap, which never shrinks...
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    if mallopt is None or not all(mallopt(parameter, value) for parameter, value in settings.items()):
        return False
    # ... in the main thread alone: the heaps of others end at 64 MB. One heap for all threads would do as well, were it
    # not that they wait for each other once compiling has left it full of holes (benchmarks/README.md).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
