"""Memory for the bytes of adapters, used again: fresh pages cost more than the copy into them."""

import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch

_GRANULE = 2**20
_MOST_SLACK = 2
"""A block is lent for no less than its size divided by this."""


class HostMemory:
    """Lends blocks; one comes back when the last tensor that views it is gone.

    Lent and spare blocks together stay within the budget, or spare ones are given back to the system. Lent
    ones alone may be more: who asks for them counts them. Thread-safe.
    """

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        # On CUDA torch's own allocator keeps page-locked memory for the next one.
        self._locked = device.type == "cuda"
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._spare: list[mmap.mmap] = []
        self._held_bytes = 0
        # Blocks come back on any thread, in the middle of anything, so without the lock.
        self._returned: deque[mmap.mmap] = deque()

    @property
    def spare_bytes(self) -> int:
        """Bytes that are held and not lent."""
        with self._lock:
            self._take_back()
            return sum(map(len, self._spare))

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """[size_bytes] uint8. What it holds is left from others: read nothing that you did not write."""
        if self._locked or not size_bytes:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._locked)
        with self._lock:
            self._take_back()
            block = self._find_spare(size_bytes)
            if block is None:
                length = -(-size_bytes // _GRANULE) * _GRANULE
                self._held_bytes += length
                self._trim()
        if block is None:
            block = self._map(length)
        lent = np.frombuffer(block, np.uint8, size_bytes)
        weakref.finalize(lent, self._returned.append, block).atexit = False
        return torch.from_numpy(lent)

    def _map(self, length: int) -> mmap.mmap:
        try:
            return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            with self._lock:
                self._held_bytes -= length
            raise

    def _take_back(self) -> None:
        while self._returned:
            self._spare.append(self._returned.popleft())

    def _find_spare(self, size_bytes: int) -> mmap.mmap | None:
        fitting = [
            block
            for block in self._spare
            if size_bytes <= len(block) <= max(_GRANULE, _MOST_SLACK * size_bytes)
        ]
        block = min(fitting, key=len, default=None)
        if block is not None:
            self._spare.remove(block)
        return block

    def _trim(self) -> None:
        """Those that came back first go first. Without a reference they are the system's again."""
        while self._spare and self._held_bytes > self._budget:
            self._held_bytes -= len(self._spare.pop(0))
