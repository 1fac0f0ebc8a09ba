"""Streams of kept bytes, each piece read in a thread while the one before it is on its way."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing

from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.rpc.payloads import payload_head
from adaptermesh.store.blob_reading import BlobReader, HeadedRange
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.records import SourceFile, VersionRecord
from adaptermesh.store.rows import StoredVersion

FILE_PIECE_BYTES = 512 * 1024
_SMALL_PIECE_BYTES = 128 * 1024
_FEW = 8
MAX_PIECE_BYTES = 1024 * 1024

_Range = tuple[int, int]
"""An offset and a size."""
_Block = list[HeadedRange]
"""Ranges without a gap between them."""


class ReadAhead:
    """How many blocks may be in memory before they are asked for, of all streams together.

    A stream for which there is no room reads what it sends, and then the next; so it takes nothing from the
    others if nobody reads it.
    """

    def __init__(self, blocks: int = 8) -> None:
        self._left = blocks

    def take(self) -> bool:
        """Makes room for a block if there is any."""
        if self._left == 0:
            return False
        self._left -= 1
        return True

    def give_back(self) -> None:
        """The block was asked for, or is not wanted any more."""
        self._left += 1


class Downloads:
    """Kept bytes as a stream of messages, each of which is one field of them and ready to be sent."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._ahead = ReadAhead()
        self._running = 0

    async def tensors(
        self, version: StoredVersion, manifest: bytes, offset: int, field: int
    ) -> AsyncGenerator[bytes]:
        """The tensor file from an offset, cut where the manifest's chunks end.

        Raises:
            MeshError: OUT_OF_RANGE for an offset past the end; DATA_CORRUPT if sizes don't agree.
        """
        check_offset(offset, version.record.size_bytes)
        chunks = _chunks(manifest)
        async with self._blobs.open(version.tensor_digest) as reader:
            end = sum(chunks[-1]) if chunks else 0
            if not reader.size == version.record.size_bytes == end:
                problem = f"the tensor file has {reader.size} bytes, the manifest says {end}"
                raise _corrupt(version.record.digest, problem)
            async with aclosing(self._messages(reader, _chunk_ranges(chunks, offset), field)) as messages:
                async for message in messages:
                    yield message

    async def file(self, file: SourceFile, offset: int, field: int) -> AsyncGenerator[bytes]:
        """An uploaded file from an offset; raises MeshError OUT_OF_RANGE or DATA_CORRUPT."""
        check_offset(offset, file.size_bytes)
        async with self._blobs.open(file.digest) as reader:
            if reader.size != file.size_bytes:
                raise _corrupt(file.digest, f"the file has {reader.size} bytes, not {file.size_bytes}")
            # Of each stream one message is in memory, and another in gRPC's.
            most = FILE_PIECE_BYTES if self._running < _FEW else _SMALL_PIECE_BYTES
            ranges = _even_ranges(offset, file.size_bytes, most)
            async with aclosing(self._messages(reader, ranges, field)) as messages:
                async for message in messages:
                    yield message

    async def _messages(
        self, reader: BlobReader, ranges: Iterable[_Range], field: int
    ) -> AsyncGenerator[bytes]:
        """Reads the next block while one is handed out, if there is room."""
        blocks = _blocks(ranges, field, reader.block_bytes if self._running < _FEW else FILE_PIECE_BYTES)
        block = next(blocks, None)
        ahead: asyncio.Task[list[bytes]] | None = None
        self._running += 1
        try:
            while block is not None:
                if ahead is None:
                    messages = await reader.read_behind(block)
                else:
                    messages = await ahead
                    ahead = None
                    self._ahead.give_back()
                block = next(blocks, None)
                if block is not None and self._running <= _FEW and self._ahead.take():
                    ahead = asyncio.create_task(reader.read_behind(block))
                messages.reverse()
                while messages:
                    yield messages.pop()
        finally:
            self._running -= 1
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)
                self._ahead.give_back()


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


def _blocks(ranges: Iterable[_Range], field: int, most: int) -> Iterator[_Block]:
    """Puts ranges together that are read at once, and sent one by one."""
    block: _Block = []
    for offset, size in ranges:
        if block and offset + size - block[0].offset > most:
            yield block
            block = []
        block.append(HeadedRange(offset, size, payload_head(field, size)))
    if block:
        yield block


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


def _even_ranges(offset: int, size: int, most: int) -> Iterator[_Range]:
    for start in range(offset, size, most):
        yield start, min(most, size - start)


def _corrupt(digest: str, message: str) -> MeshError:
    return MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, message, metadata={"digest": digest})
