"""The bytes of an upload on their way in: on disk, counted and hashed as they arrive."""

import asyncio
import hashlib
import shutil
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.headers import invalid_upload
from adaptermesh.store.records import SourceFile

T = TypeVar("T")

MAX_PIECE_BYTES = 1024 * 1024
_INTENDED = "intended-blobs"


class Staging:
    """A folder with one folder for each upload in progress."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def recover(self) -> None:
        """Makes the folder and removes what a crash left in it."""
        await asyncio.to_thread(self._recover)

    async def left_blobs(self) -> set[str]:
        """The blobs that uploads before a crash may have kept without publishing their version."""
        return await asyncio.to_thread(self._left_blobs)

    def place(self) -> "Place":
        """A folder for one upload, made on first use."""
        return Place(self._folder / uuid.uuid4().hex)

    def _left_blobs(self) -> set[str]:
        left: set[str] = set()
        for intended in self._folder.glob(f"*/{_INTENDED}"):
            # What a power cut left of such a note may end in half a digest.
            left.update(digest for digest in intended.read_text().split() if is_digest(digest))
        return left

    def _recover(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.iterdir():
            shutil.rmtree(left, ignore_errors=True)


class Place:
    """One upload's folder. A thread whose caller was cancelled can't bring it back after `discard`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._discarded = False
        self._unsettled = False

    async def do(self, job: Callable[[], T]) -> T:
        """Runs a job on the folder's files in a thread."""
        return await asyncio.to_thread(self._do, job)

    async def intend(self, digests: Iterable[str]) -> None:
        """Notes which blobs are about to be kept, so that a start after a crash can remove them."""
        text = "\n".join(digests)
        await self.do(lambda: (self.folder / _INTENDED).write_text(text))
        self._unsettled = True

    def settle(self) -> None:
        """The blobs are a version's now."""
        self._unsettled = False

    async def discard(self) -> None:
        """Removes the folder, after the job that runs now. Unsettled intentions stay for the next start."""
        await asyncio.to_thread(self._discard)

    def _do(self, job: Callable[[], T]) -> T:
        with self._lock:
            if self._discarded:
                raise RuntimeError("the upload is over")
            self.folder.mkdir(exist_ok=True)
            return job()

    def _discard(self) -> None:
        with self._lock:
            self._discarded = True
            if not self._unsettled:
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            for file in self.folder.iterdir():
                if file.name != _INTENDED:
                    file.unlink(missing_ok=True)


async def receive_files(
    place: Place, files: tuple[SourceFile, ...], pieces: AsyncIterator[bytes], idle_seconds: float
) -> Mapping[str, Path]:
    """Writes the files of an upload; returns where each one is.

    The file system never sees the paths that the client chose.

    Args:
        place: the upload's folder.
        files: in the order of their bytes.
        pieces: the bytes; a piece never goes beyond the end of its file.
        idle_seconds: how long to wait for the next piece.

    Raises:
        MeshError: INVALID_UPLOAD for bytes that are missing or too many, DIGEST_MISMATCH for wrong ones,
            DEADLINE_EXCEEDED for a client that stopped sending.
    """
    sources: dict[str, Path] = {}
    for index, file in enumerate(files):
        sources[file.path] = place.folder / f"source-{index:03}"
        await _receive_file(place, sources[file.path], file, pieces, idle_seconds)
    extra = await next_message(pieces, idle_seconds)
    if extra is not None:
        raise invalid_upload("there are bytes after the end of the last file")
    return sources


async def _receive_file(
    place: Place, path: Path, file: SourceFile, pieces: AsyncIterator[bytes], idle: float
) -> None:
    digest = hashlib.sha256()
    received = 0
    with await place.do(lambda: path.open("xb")) as target:
        while received < file.size_bytes:
            piece = await next_message(pieces, idle)
            if piece is None:
                message = f"file '{file.path}' ends after {received} of {file.size_bytes} bytes"
                raise invalid_upload(message, file=file.path)
            if not 1 <= len(piece) <= MAX_PIECE_BYTES:
                raise invalid_upload(
                    f"a message holds {len(piece)} bytes, 1 to {MAX_PIECE_BYTES} are allowed"
                )
            received += len(piece)
            if received > file.size_bytes:
                message = f"a message goes beyond the {file.size_bytes} bytes of file '{file.path}'"
                raise invalid_upload(message, file=file.path)
            await place.do(partial(_write, target, digest, piece))
    found = f"sha256:{digest.hexdigest()}"
    if found != file.digest:
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.DIGEST_MISMATCH,
            f"file '{file.path}' has digest {found}, the header says {file.digest}",
            metadata={"file": file.path, "digest": found, "expected_digest": file.digest},
        )


async def next_message(messages: AsyncIterator[T], idle_seconds: float) -> T | None:
    """The client's next message, None after the last; raises MeshError DEADLINE_EXCEEDED if it is silent."""
    try:
        async with asyncio.timeout(idle_seconds):
            return await anext(messages, None)
    except TimeoutError as error:
        message = f"nothing came for {idle_seconds:g} s"
        raise MeshError(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, message) from error


def _write(target: BinaryIO, digest: "hashlib._Hash", piece: bytes) -> None:
    target.write(piece)
    digest.update(piece)
