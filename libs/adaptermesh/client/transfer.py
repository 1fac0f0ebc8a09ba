"""Bytes of adapters to the store and back, with progress and digests."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client.records import Lineage, Publication, SourceFile
from adaptermesh.client.source_folder import FolderFile, digest_file
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName

MESSAGE_BYTES = 512 * 2**10
_NOT_A_FILE = "not a file"
STATUS_LOST = "Internal error from Core"
"""gRPC's word for a refusal that crossed a message."""
_UPLOAD_PAUSES = (0.0, 0.05, 0.5)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is: bytes of all files together, and the file that moves now."""

    path: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[Progress], None]
FileStream = Callable[[int], AsyncIterator[bytes]]
"""Opens the stream of one stored file from an offset."""


def upload_header(
    adapter: AdapterName,
    publication: Publication,
    files: Sequence[FolderFile],
    lineage: Lineage,
    *,
    validate_only: bool,
    expected_digest: str = "",
) -> store_pb2.UploadHeader:
    """What is sent before the bytes."""
    return store_pb2.UploadHeader(
        namespace=adapter.namespace,
        name=adapter.name,
        base_model=publication.base_model,
        task=publication.task,
        description=publication.description,
        tags=publication.tags,
        license=publication.license,
        author=publication.author,
        files=[
            adapter_pb2.SourceFile(path=f.source.path, size_bytes=f.source.size_bytes, digest=f.source.digest)
            for f in files
        ],
        validate_only=validate_only,
        parents=lineage.parents,
        merge_recipe_json="" if lineage.merge_recipe is None else json.dumps(lineage.merge_recipe),
        expected_digest=expected_digest,
    )


async def send_upload(
    upload: Callable[
        [AsyncIterator[store_pb2.UploadAdapterRequest]], Awaitable[store_pb2.UploadAdapterResponse]
    ],
    header: store_pb2.UploadHeader,
    files: Sequence[FolderFile],
    progress: ProgressCallback | None,
) -> store_pb2.UploadAdapterResponse:
    """Sends an upload, once more with pauses if gRPC lost the store's refusal on the way.

    A store may refuse before it has all bytes. grpc.aio then reports its own failed write instead of the
    refusal when the two cross (grpc/grpc#36066); a pause after each message lets the refusal arrive. The same
    content again is the same version, so sending it twice does no harm.
    """
    for pause_seconds in _UPLOAD_PAUSES[:-1]:
        try:
            return await upload(upload_messages(header, files, progress, pause_seconds))
        except MeshError as error:
            if error.message != STATUS_LOST:
                raise
    return await upload(upload_messages(header, files, progress, _UPLOAD_PAUSES[-1]))


async def upload_messages(
    header: store_pb2.UploadHeader,
    files: Sequence[FolderFile],
    progress: ProgressCallback | None,
    pause_seconds: float = 0.0,
) -> AsyncIterator[store_pb2.UploadAdapterRequest]:
    """The header, then the bytes of each file in order; one message holds bytes of one file only."""
    yield store_pb2.UploadAdapterRequest(header=header)
    await asyncio.sleep(pause_seconds)
    total = sum(file.source.size_bytes for file in files)
    done = 0
    for file in files:
        offset = 0
        while data := await asyncio.to_thread(_read, file.location, offset):
            yield store_pb2.UploadAdapterRequest(data=data)
            await asyncio.sleep(pause_seconds)
            offset += len(data)
            done += len(data)
            if progress is not None:
                progress(Progress(file.source.path, done, total))


def _read(location: Path, offset: int) -> bytes:
    """The bytes of one message. No file stays open between two: a broken stream is never resumed."""
    with location.open("rb") as file:
        file.seek(offset)
        return file.read(MESSAGE_BYTES)


def destination(folder: Path, path: str) -> Path:
    """Where a stored file goes; refuses a path that leaves the folder.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): the path is absolute or climbs out.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or any(part in {"..", "."} for part in parts):
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"the store names a file {path!r}, which is not safe to write",
        )
    return folder.joinpath(*parts)


async def is_there(file: SourceFile, place: Path, *, force: bool) -> bool:
    """True if the file lies there already with the same bytes.

    Raises:
        MeshError: ALREADY_EXISTS: something else lies there, and `force` is not set.
    """
    found = await asyncio.to_thread(_what_lies_at, place)
    if found in {"", file.digest}:
        return found == file.digest
    if force and found != _NOT_A_FILE:
        return False
    raise MeshError(
        Code.ALREADY_EXISTS,
        Reason.INVALID_FIELD,
        f"'{place}' exists and differs; choose another folder, or overwrite it with force",
        metadata={"path": str(place)},
    )


async def fetch_file(
    file: SourceFile, place: Path, stream: FileStream, on_bytes: Callable[[int], None]
) -> None:
    """Brings one stored file to `place`, verified; a partial file of an earlier attempt is continued.

    Args:
        file: path, size and digest.
        place: where it goes. Until it is complete its bytes are in a `.part` file beside it.
        stream: opens the stored bytes from an offset.
        on_bytes: gets the number of bytes that are there, from time to time.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): the bytes are not those of the digest.
    """
    await asyncio.to_thread(place.parent.mkdir, parents=True, exist_ok=True)
    # The digest in the name: a partial file is only continued with the bytes it began with.
    part = place.with_name(f".{place.name}.{file.digest.removeprefix('sha256:')[:16]}.part")
    resumed = await asyncio.to_thread(_size_of, part)
    found = await _receive(file, part, stream, on_bytes)
    if found != file.digest and resumed:
        await asyncio.to_thread(part.unlink)
        found = await _receive(file, part, stream, on_bytes)
    if found != file.digest:
        await asyncio.to_thread(part.unlink)
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"'{file.path}' arrived as {found}, not as {file.digest}",
            metadata={"path": file.path, "digest": file.digest},
        )
    await asyncio.to_thread(part.replace, place)


async def _receive(file: SourceFile, part: Path, stream: FileStream, on_bytes: Callable[[int], None]) -> str:
    """Appends what is missing to `part`; returns the digest of all of it."""
    digest, offset = await asyncio.to_thread(_open_part, part, file.size_bytes)
    on_bytes(offset)
    if offset == file.size_bytes and offset > 0:
        return f"sha256:{digest.hexdigest()}"
    handle = await asyncio.to_thread(part.open, "ab")
    try:
        async for data in stream(offset):
            await asyncio.to_thread(handle.write, data)
            digest.update(data)
            offset += len(data)
            on_bytes(min(offset, file.size_bytes))
    finally:
        await asyncio.to_thread(handle.close)
    return f"sha256:{digest.hexdigest()}"


def _open_part(part: Path, size_bytes: int) -> "tuple[hashlib._Hash, int]":
    """The running digest of what an earlier attempt left, and its length; drops what is too long."""
    digest = hashlib.sha256()
    length = _size_of(part)
    if length > size_bytes:
        part.unlink()
        length = 0
    if length:
        with part.open("rb") as file:
            while block := file.read(MESSAGE_BYTES):
                digest.update(block)
    return digest, length


def _what_lies_at(place: Path) -> str:
    """A file's digest, "" for nothing, or `_NOT_A_FILE`."""
    if not place.exists():
        return ""
    return digest_file(place) if place.is_file() else _NOT_A_FILE


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
