"""How the C library's allocator treats blocks as large as the messages of a transfer."""

import ctypes

# See mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

# Far above a message: each would otherwise be a mapping of its own, whose every page is cleared at first use.
_MMAP_BYTES = 16 * 2**20
# What is free at the end of the heap is kept up to here.
_TRIM_BYTES = 16 * 2**20
# Each has free blocks of its own, which no other thread uses.
_ARENAS = 1


def set_up_allocator() -> bool:
    """Has the blocks of all threads used again from one heap; False where the allocator is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _TRIM_BYTES))
    taken = [mallopt(option, value) == 1 for option, value in options]
    return all(taken)
