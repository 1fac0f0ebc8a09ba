"""Streams of kept bytes, each piece read in a thread while the one before it is on its way."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator

from adaptermesh.artifact.manifest import Chunk, Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.store.blobs import BlobReader, BlobStore
from adaptermesh.store.records import SourceFile, VersionRecord
from adaptermesh.store.rows import StoredVersion

FILE_PIECE_BYTES = 512 * 1024

_Range = tuple[int, int]


async def read_manifest(blobs: BlobStore, digest: str) -> bytes:
    """A version's canonical manifest; raises MeshError DATA_CORRUPT if it isn't what was kept."""
    async with blobs.open(digest) as reader:
        data = await reader.read(0, reader.size)
    if digest_bytes(data) != digest:
        raise _corrupt(digest, "the manifest has another digest")
    return data


async def read_tensors(
    blobs: BlobStore, version: StoredVersion, manifest: bytes, offset: int
) -> AsyncGenerator[bytes]:
    """The tensor file from an offset, cut where the manifest's chunks end.

    Raises:
        MeshError: OUT_OF_RANGE for an offset past the end; DATA_CORRUPT if sizes don't agree.
    """
    check_offset(offset, version.record.size_bytes)
    chunks = (await asyncio.to_thread(Manifest.from_bytes, manifest)).chunks
    async with blobs.open(version.tensor_digest) as reader:
        end = chunks[-1].offset + chunks[-1].size if chunks else 0
        if not reader.size == version.record.size_bytes == end:
            message = f"the tensor file has {reader.size} bytes, the manifest says {end}"
            raise _corrupt(version.record.digest, message)
        async for piece in _pieces(reader, _chunk_ranges(chunks, offset)):
            yield piece


async def read_file(blobs: BlobStore, file: SourceFile, offset: int) -> AsyncGenerator[bytes]:
    """An uploaded file from an offset; raises MeshError OUT_OF_RANGE or DATA_CORRUPT."""
    check_offset(offset, file.size_bytes)
    async with blobs.open(file.digest) as reader:
        if reader.size != file.size_bytes:
            raise _corrupt(file.digest, f"the file has {reader.size} bytes, not {file.size_bytes}")
        async for piece in _pieces(reader, _even_ranges(offset, file.size_bytes)):
            yield piece


def find_file(version: VersionRecord, path: str) -> SourceFile:
    """A version's uploaded file; raises MeshError FILE_NOT_FOUND."""
    for file in version.source_files:
        if file.path == path:
            return file
    raise not_found(Reason.FILE_NOT_FOUND, "file", path[:255])


def check_offset(offset: int, size: int) -> None:
    """Raises MeshError for an offset that is not in [0, size]."""
    if offset < 0:
        raise invalid_field("offset", "must not be negative")
    if offset > size:
        raise MeshError(
            Code.OUT_OF_RANGE,
            Reason.INVALID_FIELD,
            f"offset: {offset} is past the end, {size}",
            metadata={"field": "offset", "size_bytes": str(size)},
        )


async def _pieces(reader: BlobReader, ranges: Iterable[_Range]) -> AsyncGenerator[bytes]:
    """Reads one range ahead of the one that is handed out, never more."""
    ahead: deque[asyncio.Task[bytes]] = deque()
    try:
        for offset, size in ranges:
            ahead.append(asyncio.create_task(_read(reader, offset, size)))
            if len(ahead) > 1:
                yield await ahead.popleft()
        while ahead:
            yield await ahead.popleft()
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


async def _read(reader: BlobReader, offset: int, size: int) -> bytes:
    return await reader.read(offset, size)


def _chunk_ranges(chunks: tuple[Chunk, ...], offset: int) -> Iterator[_Range]:
    for chunk in chunks:
        end = chunk.offset + chunk.size
        start = max(chunk.offset, offset)
        if start < end:
            yield start, end - start


def _even_ranges(offset: int, size: int) -> Iterator[_Range]:
    for start in range(offset, size, FILE_PIECE_BYTES):
        yield start, min(FILE_PIECE_BYTES, size - start)


def _corrupt(digest: str, message: str) -> MeshError:
    return MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, message, metadata={"digest": digest})
