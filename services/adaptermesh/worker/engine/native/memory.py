"""Memory that the kernels walk through, on large pages where the system gives them."""

import contextlib
import mmap

import torch


def page_memory(size_bytes: int) -> torch.Tensor:
    """[size_bytes] uint8 of zeros, at the start of a page; freed with the last tensor that views it."""
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A wish: not every kernel has large pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size_bytes]
