"""What of an upload is still to be sent, cut into parts, and the messages of one part."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.transfer import MESSAGE_BYTES
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason

Ranges = Mapping[str, Sequence[tuple[int, int]]]
"""Of each file's path: offsets and sizes, in order, without overlap."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one file."""

    file: FolderFile
    offset: int
    size_bytes: int


def missing_parts(files: Sequence[FolderFile], received: Ranges, most_bytes: int) -> Iterator[Part]:
    """What is not received yet."""
    for file in files:
        start = 0
        for offset, size in (*received.get(file.source.path, ()), (file.source.size_bytes, 0)):
            for begin in range(start, offset, most_bytes):
                yield Part(file, begin, min(most_bytes, offset - begin))
            start = offset + size


def received_bytes(received: Ranges) -> int:
    return sum(size for ranges in received.values() for _, size in ranges)


def read_part(part: Part) -> tuple[bytes, str]:
    """Its bytes and their digest. Blocks.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD): the file is not what it was any more.
    """
    with part.file.location.open("rb") as file:
        file.seek(part.offset)
        data = file.read(part.size_bytes)
    if len(data) < part.size_bytes:
        message = f"'{part.file.location}' has become shorter while it was uploaded"
        raise MeshError(Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD, message)
    return data, digest_bytes(data)


async def part_messages(
    header: store_pb2.PartHeader, data: bytes, on_bytes: Callable[[int], None], pause_seconds: float
) -> AsyncIterator[store_pb2.UploadPartRequest]:
    """The header, then the bytes.

    Args:
        header: which part it is.
        data: all of its bytes.
        on_bytes: hears how many more bytes are on their way.
        pause_seconds: how long to wait for a refusal of the header, which gRPC loses if it crosses a message.
    """
    yield store_pb2.UploadPartRequest(header=header)
    await asyncio.sleep(pause_seconds)
    for start in range(0, len(data), MESSAGE_BYTES):
        piece = data[start : start + MESSAGE_BYTES]
        yield store_pb2.UploadPartRequest(data=piece)
        on_bytes(len(piece))
