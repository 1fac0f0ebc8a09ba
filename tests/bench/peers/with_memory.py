"""How fast this machine reads memory, with all cores and more bytes than any cache holds."""

import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.bench.peers.serve import serve

_BYTES = 2 * 2**30
_REPEATS = 5


class MemoryPeer:
    """Reads and copies one large block."""

    def __init__(self) -> None:
        self._block = torch.empty(0)
        self._other = torch.empty(0)

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._block = torch.ones(_BYTES // 4)
        self._other = torch.zeros(_BYTES // 4)
        return {"versions": {"torch": importlib.metadata.version("torch")}}

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Bytes a second: `read` sums the block, `copy` counts the bytes read and those written."""
        read = _best(lambda: self._block.sum())
        copy = _best(lambda: self._other.copy_(self._block))
        return {"read": _BYTES / read, "copy": 2 * _BYTES / copy}


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    peer = MemoryPeer()
    serve({"load": peer.load, "run": peer.run})
