"""Bytes by the digest of their content."""

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from adaptermesh.core.digests import is_digest
from adaptermesh.store.blob_reading import BlobReader, corrupt_blob
from adaptermesh.store.file_reading import FileReader, read_file

T = TypeVar("T")

_PIECE = 1024 * 1024
_READ_THREADS = 4
_PREFIX = "sha256:"
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob that is there, without its bytes."""

    digest: str
    size_bytes: int
    modify_time: float
    """When it was put, by the backend's clock: seconds since 1970."""


class BlobStore(Protocol):
    """Blobs that never change. What `put` has returned for survives a crash.

    Every call may raise MeshError UNAVAILABLE (STORE_UNREACHABLE) if the backend can't be reached.
    """

    async def recover(self) -> None:
        """Makes the backend ready, and removes what a crash left that nobody else can be at work on.

        Raises:
            MeshError: it can't be used; the message says why.
        """
        ...

    async def close(self) -> None:
        """Lets go of connections and threads."""
        ...

    async def put(self, digest: str, source: Path) -> None:
        """Keeps the content of a file; the same content again changes nothing.

        Raises:
            MeshError: DATA_CORRUPT if the file doesn't have that digest; nothing is kept then.
        """
        ...

    def open(self, digest: str) -> AbstractAsyncContextManager[BlobReader]:
        """Opens a blob; raises MeshError DATA_CORRUPT if there is none, since the catalogue says there is."""
        ...

    async def get(self, digest: str, most_bytes: int) -> bytes:
        """All of a small blob; raises MeshError DATA_CORRUPT if there is none, or a larger one."""
        ...

    async def stat(self, digest: str) -> StoredBlob | None:
        """The blob with a digest, if there is one."""
        ...

    def scan(self) -> AsyncGenerator[StoredBlob]:
        """Every blob, in no order. One that comes or goes meanwhile may be in it or not."""
        ...

    async def delete(self, digest: str) -> None:
        """Removes a blob, if it is there. It is over when this returns, also by an error."""
        ...

    async def unfinished(self, before: float) -> int:
        """How many calls of `put` began before a time (seconds since 1970) and never came to an end."""
        ...

    async def discard_unfinished(self, before: float) -> int:
        """Removes what those left; returns how many there were."""
        ...


class FolderBlobStore:
    """Blobs as files: `<folder>/sha256/<2 digits>/<62 digits>`.

    A blob is written under a temporary name, synced and renamed, so a file that has a digest's name is whole.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "sha256"
        self._temporary = folder / "tmp"
        # What is being written is not left over, however young the garbage is that is asked for.
        self._writing: set[Path] = set()
        # Of their own: a read never waits behind what is written, which waits for the disk.
        self._reading = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="blob-read")

    async def recover(self) -> None:
        """Makes the folders and removes what a crash left under temporary names."""
        await asyncio.to_thread(self._recover)

    async def close(self) -> None:
        """A read that runs ends by itself."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def put(self, digest: str, source: Path) -> None:
        await asyncio.to_thread(self._put, digest, source)

    @asynccontextmanager
    async def open(self, digest: str) -> AsyncIterator[BlobReader]:
        reader = await self._read(FileReader, self._path(digest), digest, self._reading)
        try:
            yield reader
        finally:
            reader.close()

    async def get(self, digest: str, most_bytes: int) -> bytes:
        return await self._read(read_file, self._path(digest), digest, most_bytes)

    async def stat(self, digest: str) -> StoredBlob | None:
        return await asyncio.to_thread(_stat, self._path(digest), digest)

    async def scan(self) -> AsyncGenerator[StoredBlob]:
        found = self._scan()
        while page := await asyncio.to_thread(lambda: [*islice(found, _PAGE)]):
            for blob in page:
                yield blob

    async def delete(self, digest: str) -> None:
        await asyncio.to_thread(self._path(digest).unlink, missing_ok=True)

    async def unfinished(self, before: float) -> int:
        return len(await asyncio.to_thread(self._unfinished, before))

    async def discard_unfinished(self, before: float) -> int:
        left = await asyncio.to_thread(self._unfinished, before)
        for path in left:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return len(left)

    async def _read(self, job: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, job, *arguments)

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        digits = digest.removeprefix(_PREFIX)
        return self._blobs / digits[:2] / digits[2:]

    def _recover(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._temporary.mkdir(parents=True, exist_ok=True)
        for left in self._temporary.iterdir():
            left.unlink(missing_ok=True)

    def _scan(self) -> Iterator[StoredBlob]:
        for path in self._blobs.glob("??/*"):
            digest = f"{_PREFIX}{path.parent.name}{path.name}"
            blob = _stat(path, digest) if is_digest(digest) else None
            if blob is not None:
                yield blob

    def _unfinished(self, before: float) -> list[Path]:
        left = [path for path in self._temporary.iterdir() if path not in self._writing]
        times = ((path, _modify_time(path)) for path in left)
        return [path for path, time in times if time is not None and time < before]

    def _put(self, digest: str, source: Path) -> None:
        target = self._path(digest)
        if not target.exists():
            temporary = self._temporary / uuid.uuid4().hex
            self._writing.add(temporary)
            try:
                if _copy(source, temporary) != digest:
                    raise corrupt_blob(digest, "what was to be kept has another digest")
                target.parent.mkdir(exist_ok=True)
                temporary.rename(target)
            finally:
                temporary.unlink(missing_ok=True)
                self._writing.discard(temporary)
        # Also if somebody else has put it: that call may not have come this far yet.
        _sync_folder(target.parent)
        _sync_folder(self._blobs)


def file_digest(path: Path) -> str:
    """The digest of a file's content; blocks."""
    with path.open("rb") as file:
        return _PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


def _stat(path: Path, digest: str) -> StoredBlob | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return StoredBlob(digest, found.st_size, found.st_mtime)


def _modify_time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _copy(source: Path, target: Path) -> str:
    """Copies and syncs a file; returns the digest of what was written."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        for piece in _pieces(reader):
            digest.update(piece)
            writer.write(piece)
        writer.flush()
        os.fsync(writer.fileno())
    return _PREFIX + digest.hexdigest()


def _pieces(reader: BinaryIO) -> Iterator[bytes]:
    while piece := reader.read(_PIECE):
        yield piece


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
