"""Bytes of files, read by position in threads."""

import asyncio
import io
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from adaptermesh.store.blob_reading import HeadedRange, corrupt_blob

_BLOCK_BYTES = 512 * 1024


class FileReader:
    """A file that is read by position, each piece in a thread."""

    def __init__(self, path: Path, digest: str, threads: Executor) -> None:
        self._digest = digest
        self._threads = threads
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise corrupt_blob(digest, "it is missing") from error
        self._size = os.fstat(self._file).st_size
        self._pending: set[asyncio.Future[list[bytes]]] = set()
        self._closed = False

    @property
    def size(self) -> int:
        return self._size

    @property
    def block_bytes(self) -> int:
        return _BLOCK_BYTES

    async def read(self, offset: int, size: int) -> bytes:
        (data,) = await self.read_behind((HeadedRange(offset, size),))
        return data

    async def read_behind(self, ranges: Sequence[HeadedRange]) -> list[bytes]:
        reading = asyncio.get_running_loop().run_in_executor(self._threads, self._read, ranges)
        self._pending.add(reading)
        reading.add_done_callback(self._read_done)
        # A thread can't be interrupted; the file must stay open until it is done.
        return await asyncio.shield(reading)

    def close(self) -> None:
        self._closed = True
        if not self._pending:
            os.close(self._file)

    def _read_done(self, reading: asyncio.Future[list[bytes]]) -> None:
        self._pending.discard(reading)
        if not reading.cancelled():
            reading.exception()
        if self._closed and not self._pending:
            os.close(self._file)

    def _read(self, ranges: Sequence[HeadedRange]) -> list[bytes]:
        return [self._read_one(wanted) for wanted in ranges]

    def _read_one(self, wanted: HeadedRange) -> bytes:
        """Straight into what is given away: a large blob is copied once, by the kernel."""
        start = len(wanted.head)
        made = io.BytesIO(bytes(start + wanted.size))
        with made.getbuffer() as view:
            view[:start] = wanted.head
            done = 0
            while done < wanted.size:
                count = os.preadv(self._file, [view[start + done :]], wanted.offset + done)
                if not count:
                    raise corrupt_blob(self._digest, f"it ends before byte {wanted.end}")
                done += count
        return made.getvalue()


def read_file(path: Path, digest: str, most_bytes: int) -> bytes:
    """All of a small file; raises MeshError DATA_CORRUPT if there is none, or a larger one. Blocks."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise corrupt_blob(digest, f"it has more than {most_bytes} bytes")
            return file.read()
    except FileNotFoundError as error:
        raise corrupt_blob(digest, "it is missing") from error
