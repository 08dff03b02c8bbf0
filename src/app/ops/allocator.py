"""The C library's allocator, told to give large blocks back to the system as soon as they are free.

Left alone, glibc raises the size from which it does so with each large block that is freed, up to 32 MiB; the parts of
uploads and the buffers of tables then stay in its heaps, and the daemon keeps some 35 MiB more than it uses. It would
also make a heap for each of a dozen threads, which each keep what is free in it; on half a core two are enough.
"""

import sys

LARGE_BYTES = 1 << 20
TOP_BYTES = 16 << 20  # less than this makes the heap shrink and grow with every block of a body
HEAPS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def give_back_large_blocks() -> None:
    """For the whole process. Does nothing where the C library is another."""
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, TOP_BYTES)
        mallopt(M_ARENA_MAX, HEAPS)
