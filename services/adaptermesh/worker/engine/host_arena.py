"""Host memory for adapters: each one's canonical tensor file, at its final place from the first byte on.

The canonical form is already ordered by layer and aligned, so the file is the layout: a tensor is a view of
it, and staging copies straight from it. On a CUDA machine the memory is page-locked.
"""

import itertools
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from typing_extensions import Buffer

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.host_memory import HostMemory


@dataclass(frozen=True, slots=True)
class HostCopy:
    """One adapter in host memory. data: [size_bytes] uint8."""

    manifest: Manifest
    data: torch.Tensor


class HostArena:
    """Gives and holds host memory; who has a place in it is the tier table's to say."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._memory = HostMemory(device, budget_bytes)
        self._copies: dict[str, HostCopy] = {}

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """[size_bytes] uint8, of any content."""
        return self._memory.allocate(size_bytes)

    def put(self, digest: str, copy: HostCopy) -> None:
        self._copies[digest] = copy

    def get(self, digest: str) -> HostCopy | None:
        return self._copies.get(digest)

    def drop(self, digest: str) -> None:
        self._copies.pop(digest, None)

    def __len__(self) -> int:
        return len(self._copies)


class Landing:
    """An adapter that is arriving: bytes in order, each chunk verified in place as soon as it is complete.

    `layers_ready` counts the leading layers that are there and verified, with all before them; a layer that
    the adapter leaves alone lacks nothing. What is ready is not written again.
    """

    def __init__(self, digest: str, manifest: Manifest, data: torch.Tensor, layers: int) -> None:
        self.manifest = manifest
        self.data = data
        self.verify_ns = 0
        self._layer_ends = _layer_ends(manifest, layers)
        self.layers_ready = bisect_right(self._layer_ends, 0)
        self._digest = digest
        self._view = memoryview(cast("Buffer", data.numpy()))
        self._position = 0
        self._chunk = 0

    @property
    def position(self) -> int:
        """Bytes that have arrived."""
        return self._position

    def write(self, data: bytes | memoryview) -> None:
        """Takes the next bytes; raises MeshError DATA_LOSS (DATA_CORRUPT) for too many or wrong ones."""
        end = self._position + len(data)
        if end > len(self._view):
            raise corrupt(self._digest, f"it has more than the {len(self._view)} bytes of the manifest")
        self._view[self._position : end] = data
        self._advance(end)

    def read_from(self, readinto: Callable[[memoryview], int]) -> None:
        """Takes all bytes from a file, chunk by chunk."""
        for chunk in self.manifest.chunks:
            end = chunk.offset + chunk.size
            while self._position < end:
                count = readinto(self._view[self._position : end])
                if not count:
                    raise corrupt(self._digest, f"it ends after {self._position} bytes")
                self._advance(self._position + count)

    def finish(self) -> HostCopy:
        """All bytes have arrived; raises MeshError DATA_LOSS (DATA_CORRUPT) if not."""
        if self._position != len(self._view) or self._chunk != len(self.manifest.chunks):
            raise corrupt(self._digest, f"it ends after {self._position} of {len(self._view)} bytes")
        return HostCopy(self.manifest, self.data)

    def _advance(self, position: int) -> None:
        self._position = position
        started = time.perf_counter_ns()
        chunks = self.manifest.chunks
        while self._chunk < len(chunks):
            chunk = chunks[self._chunk]
            end = chunk.offset + chunk.size
            if end > position:
                break
            if digest_bytes(self._view[chunk.offset : end]) != chunk.sha256:
                raise corrupt(self._digest, f"chunk {self._chunk} at byte {chunk.offset} has another digest")
            self._chunk += 1
            self.layers_ready = bisect_right(self._layer_ends, end)
        self.verify_ns += time.perf_counter_ns() - started


def _layer_ends(manifest: Manifest, layers: int) -> list[int]:
    """Where in the tensor file the tensors of each layer and of all before it end."""
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    ends = [0] * layers
    for module in manifest.modules:
        for name in module.tensors.values():
            end = tensors[name].offset + tensors[name].size
            ends[module.layer] = max(ends[module.layer], end)
    return list(itertools.accumulate(ends, max))


def corrupt(digest: str, problem: str) -> MeshError:
    """Bytes that are not what the digest says."""
    return MeshError(
        Code.DATA_LOSS,
        Reason.DATA_CORRUPT,
        f"adapter {digest}: {problem}",
        metadata={"digest": digest},
        retry_after=1.0,
    )
