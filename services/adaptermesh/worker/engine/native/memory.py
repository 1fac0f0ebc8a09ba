"""Memory that the kernels walk through, on large pages where the system gives them."""

import contextlib
import mmap

import torch

_LARGE_PAGE = 2**21


def page_memory(size_bytes: int) -> torch.Tensor:
    """[size_bytes] uint8 of zeros, at the start of a large page; freed with the last tensor that views it."""
    # What lies before the first large page is never touched, so it costs nothing.
    memory = mmap.mmap(-1, size_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A wish: not every kernel has large pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _LARGE_PAGE
    return whole[start : start + size_bytes]
