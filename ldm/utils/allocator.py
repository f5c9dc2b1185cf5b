"""The memory allocator of the C library."""

import ctypes
import os

# Parameters of glibc's mallopt, in malloc.h, and the largest threshold that it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD = 32 * 2**20


def reuse_freed_memory() -> None:
    """Has glibc reuse freed memory in this process, and give none back to the system.

    A step allocates the sizes that the step before has freed. Each page that went back to the
    system in between costs a page fault. Other C libraries stay as they are, and so does one that
    the environment has set (MALLOC_TRIM_THRESHOLD_).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
