"""The canonical form of a version on its way to a client: every chunk is verified before it counts."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable
from pathlib import Path
from typing import BinaryIO

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.canonical import verify_chunk
from adaptermesh.artifact.manifest import Chunk, Manifest
from adaptermesh.client.transfer import Progress, ProgressCallback
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason


async def receive_canonical(
    messages: AsyncIterable[store_pb2.FetchAdapterResponse],
    digest: str,
    place: Path,
    progress: ProgressCallback | None,
) -> bytes:
    """Writes the tensor file to `place` as it arrives; returns the manifest's bytes.

    What lies at `place` after an error is not to be used.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): the manifest is not that of the digest, or a chunk not that of
            the manifest, or the file ends too early or too late.
    """
    data = b""
    chunks: _Chunks | None = None
    file = await asyncio.to_thread(place.open, "wb")
    try:
        async for message in messages:
            if chunks is None:
                data = message.manifest
                if digest_bytes(data) != digest:
                    raise _corrupt(digest, f"the manifest arrived as {digest_bytes(data)}")
                chunks = _Chunks(digest, Manifest.from_bytes(data), file)
                continue
            await asyncio.to_thread(chunks.add, message.data)
            if progress is not None:
                progress(Progress(place.name, chunks.done_bytes, chunks.size_bytes))
    finally:
        await asyncio.to_thread(file.close)
    if chunks is None or not chunks.complete:
        raise _corrupt(digest, "its tensors did not arrive completely")
    return data


class _Chunks:
    """Verifies and writes bytes chunk by chunk, wherever the messages end. Blocks."""

    def __init__(self, digest: str, manifest: Manifest, file: BinaryIO) -> None:
        self.size_bytes = manifest.size_bytes
        self.done_bytes = 0
        self._digest = digest
        self._left: deque[Chunk] = deque(manifest.chunks)
        self._pending = bytearray()
        self._file = file

    @property
    def complete(self) -> bool:
        return not self._left and not self._pending

    def add(self, data: bytes) -> None:
        self._pending += data
        while self._left and len(self._pending) >= self._left[0].size:
            chunk = self._left.popleft()
            piece = bytes(self._pending[: chunk.size])
            verify_chunk(chunk, piece)
            self._file.write(piece)
            self.done_bytes += chunk.size
            del self._pending[: chunk.size]
        if self._pending and not self._left:
            raise _corrupt(self._digest, "bytes come after its last chunk")


def _corrupt(digest: str, message: str) -> MeshError:
    return MeshError(
        Code.DATA_LOSS, Reason.DATA_CORRUPT, f"version {digest}: {message}", metadata={"digest": digest}
    )
