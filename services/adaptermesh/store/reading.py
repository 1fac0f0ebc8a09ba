"""Streams of kept bytes, each piece read in a thread while the one before it is on its way."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator

from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.store.blobs import BlobReader, BlobStore
from adaptermesh.store.records import SourceFile, VersionRecord
from adaptermesh.store.rows import StoredVersion

FILE_PIECE_BYTES = 512 * 1024
MAX_PIECE_BYTES = 1024 * 1024
_BLOCK_BYTES = 2 * 1024 * 1024

_Range = tuple[int, int]
"""An offset and a size."""
_Block = list[_Range]
"""Ranges without a gap between them."""


async def read_tensors(
    blobs: BlobStore, version: StoredVersion, manifest: bytes, offset: int
) -> AsyncGenerator[memoryview]:
    """The tensor file from an offset, cut where the manifest's chunks end.

    Raises:
        MeshError: OUT_OF_RANGE for an offset past the end; DATA_CORRUPT if sizes don't agree.
    """
    check_offset(offset, version.record.size_bytes)
    chunks = _chunks(manifest)
    async with blobs.open(version.tensor_digest) as reader:
        end = sum(chunks[-1]) if chunks else 0
        if not reader.size == version.record.size_bytes == end:
            message = f"the tensor file has {reader.size} bytes, the manifest says {end}"
            raise _corrupt(version.record.digest, message)
        async for piece in _pieces(reader, _chunk_ranges(chunks, offset)):
            yield piece


async def read_file(blobs: BlobStore, file: SourceFile, offset: int) -> AsyncGenerator[memoryview]:
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


async def _pieces(reader: BlobReader, ranges: Iterable[_Range]) -> AsyncGenerator[memoryview]:
    """Reads one block ahead of the one that is handed out, never more."""
    ahead: deque[tuple[_Block, asyncio.Task[bytes]]] = deque()
    try:
        for block in _blocks(ranges):
            ahead.append((block, asyncio.create_task(_read(reader, block))))
            if len(ahead) > 1:
                for piece in await _cut(*ahead.popleft()):
                    yield piece
        while ahead:
            for piece in await _cut(*ahead.popleft()):
                yield piece
    finally:
        for _, task in ahead:
            task.cancel()
        await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)


def _blocks(ranges: Iterable[_Range]) -> Iterator[_Block]:
    """Puts ranges together that are read at once, and sent one by one."""
    block: _Block = []
    for offset, size in ranges:
        if block and offset + size - block[0][0] > _BLOCK_BYTES:
            yield block
            block = []
        block.append((offset, size))
    if block:
        yield block


async def _read(reader: BlobReader, block: _Block) -> bytes:
    start, (offset, size) = block[0][0], block[-1]
    return await reader.read(start, offset + size - start)


async def _cut(block: _Block, reading: asyncio.Task[bytes]) -> list[memoryview]:
    data = memoryview(await reading)
    start = block[0][0]
    return [data[offset - start : offset - start + size] for offset, size in block]


def _chunks(manifest: bytes) -> list[_Range]:
    """Where the chunks are. All was checked at publication, and the digest says it is that manifest."""
    return [(chunk["offset"], chunk["size"]) for chunk in json.loads(manifest)["chunks"]]


def _chunk_ranges(chunks: Iterable[_Range], offset: int) -> Iterator[_Range]:
    """Whole chunks, as many as a message takes; the first one may have begun before the offset."""
    start = end = offset
    for begin, size in chunks:
        if begin + size <= offset:
            continue
        if start < end and begin + size - start > MAX_PIECE_BYTES:
            yield start, end - start
            start = end
        end = begin + size
    if start < end:
        yield start, end - start


def _even_ranges(offset: int, size: int) -> Iterator[_Range]:
    for start in range(offset, size, FILE_PIECE_BYTES):
        yield start, min(FILE_PIECE_BYTES, size - start)


def _corrupt(digest: str, message: str) -> MeshError:
    return MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, message, metadata={"digest": digest})
