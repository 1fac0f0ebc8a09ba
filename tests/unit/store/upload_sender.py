"""A client of uploads in parts, and what it needs."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import Clock, SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.store.part_intake import PartRequest
from adaptermesh.store.records import BaseModelRecord
from adaptermesh.store.stores import StoreConfig, Stores
from tests.unit.store.conftest import base_model

HOUR = 3600.0
WEIGHTS = "adapter_model.safetensors"
PIECE = 1000
STATUS_LOST = "Internal error from Core"

Files = Mapping[str, bytes]
Cut = tuple[str, int, int]
"""A file, and from where to where."""


async def paced(
    messages: Sequence[store_pb2.UploadPartRequest], pause_seconds: float
) -> AsyncIterator[store_pb2.UploadPartRequest]:
    """A refusal of the header must not cross a message: grpc.aio would lose it (grpc/grpc#36066)."""
    for number, message in enumerate(messages):
        yield message
        await asyncio.sleep(0 if number else pause_seconds)


class FastClock(SystemClock):
    """Goes ahead of the backend's clock."""

    ahead = 0.0

    def wall(self) -> float:
        return super().wall() + self.ahead


@dataclass
class Sender:
    """A client of one upload, at any store."""

    files: Files
    key: str = ""

    async def begin(self, store: Any, kit: Any, **fields: Any) -> "Sender":
        request = store_pb2.BeginUploadRequest(header=kit.make_header(self.files, **fields))
        begun = await store.stub.BeginUpload(request)
        assert begun.max_part_bytes == 8 * 2**20
        self.key = begun.upload_id
        return self

    async def part(
        self, store: Any, cut: Cut, data: bytes | None = None, **header: Any
    ) -> store_pb2.UploadPartResponse:
        path, start, end = cut
        content = self.files[path][start:end] if data is None else data
        values = {
            "upload_id": self.key,
            "path": path,
            "offset": start,
            "size_bytes": end - start,
            "digest": digest_bytes(content),
        }
        first = store_pb2.UploadPartRequest(header=store_pb2.PartHeader(**{**values, **header}))
        pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
        messages = [first, *(store_pb2.UploadPartRequest(data=piece) for piece in pieces)]

        for pause_seconds in (0.02, 0.2, 1.0):
            try:
                done: store_pb2.UploadPartResponse = await store.stub.UploadPart(
                    paced(messages, pause_seconds)
                )
            except grpc.aio.AioRpcError as error:
                lost = error
                if error.details() != STATUS_LOST:
                    raise
            else:
                return done
        raise lost

    async def parts(self, store: Any, cuts: Sequence[Cut]) -> None:
        for cut in cuts:
            assert (await self.part(store, cut)).created

    async def received(self, store: Any) -> dict[str, list[tuple[int, int]]]:
        found = await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id=self.key))
        return {file.path: [(r.offset, r.size_bytes) for r in file.ranges] for file in found.files}

    async def complete(self, store: Any) -> store_pb2.CompleteUploadResponse:
        request = store_pb2.CompleteUploadRequest(upload_id=self.key)
        done: store_pb2.CompleteUploadResponse = await store.stub.CompleteUpload(request)
        return done

    async def abandon(self, store: Any) -> None:
        await store.stub.AbandonUpload(store_pb2.AbandonUploadRequest(upload_id=self.key))


def cuts(files: Files, size: int = 2500) -> list[Cut]:
    """Every byte of every file, once."""
    return [
        (path, start, min(start + size, len(data)))
        for path, data in files.items()
        for start in range(0, len(data), size)
    ]


async def kept_parts(stores: Stores) -> set[str]:
    return {blob.digest async for blob in stores.parts._blobs.scan()}


async def read_back(store: Any, version: Any) -> dict[str, bytes]:
    found = {}
    for file in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=file.path)
        found[file.path] = b"".join([part.data async for part in store.stub.DownloadFile(request)])
    return found


async def opened(config: StoreConfig, clock: Clock) -> Stores:
    """A store with one base model."""
    stores = Stores(config, clock)
    await stores.open()
    base = base_model()
    fields = BaseModelRecord.__dataclass_fields__
    await stores.catalogue.register_base_model(
        BaseModelRecord(**{name: getattr(base, name) for name in fields})
    )
    return stores


async def send(
    stores: Stores, key: str, files: Files, path: str, start: int = 0, end: int | None = None
) -> bool:
    """Sends one part without a server; returns whether it is new."""
    data = files[path][start:end]

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    request = PartRequest(path, start, len(data), digest_bytes(data))
    return (await stores.sessions.receive(key, request, pieces())).created
