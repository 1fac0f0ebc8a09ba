"""The part of the store's gRPC face that takes uploads, in one piece or in parts."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.store import wire
from adaptermesh.store.headers import invalid_upload
from adaptermesh.store.part_intake import PartRequest
from adaptermesh.store.session_rows import UploadSession
from adaptermesh.store.upload_progress import MAX_PART_BYTES, received_ranges
from adaptermesh.store.with_stores import WithStores

Context = Any
Piece = TypeVar("Piece", store_pb2.UploadAdapterRequest, store_pb2.UploadPartRequest)


class UploadServicer(WithStores, store_pb2_grpc.StoreServiceServicer):
    """Uploads. Errors are raised as `MeshError`."""

    async def UploadAdapter(self, request_iterator: Any, context: Context) -> store_pb2.UploadAdapterResponse:
        # Closed here, also after a refusal in the middle: it must not outlive the call.
        async with aclosing(aiter(request_iterator)) as messages:
            first = await self._stores.uploads.first(messages)
            if first is None or first.WhichOneof("part") != "header":
                raise invalid_upload("the first message must be the header")
            async with aclosing(_data(messages)) as pieces:
                outcome = await self._stores.uploads.receive(wire.header_from(first.header), pieces)
        return store_pb2.UploadAdapterResponse(
            version=wire.version_to(outcome.version),
            created=outcome.created,
            feed_position=outcome.feed_position,
        )

    async def BeginUpload(
        self, request: store_pb2.BeginUploadRequest, context: Context
    ) -> store_pb2.BeginUploadResponse:
        key, session = await self._stores.sessions.begin(wire.header_from(request.header))
        return store_pb2.BeginUploadResponse(
            upload_id=key, max_part_bytes=MAX_PART_BYTES, expire_time=_time(session.expire_time_us)
        )

    async def UploadPart(self, request_iterator: Any, context: Context) -> store_pb2.UploadPartResponse:
        # As above.
        async with aclosing(aiter(request_iterator)) as messages:
            first = await self._stores.sessions.first(messages)
            if first is None or first.WhichOneof("part") != "header":
                raise invalid_upload("the first message must be the part's header")
            header = first.header
            part = PartRequest(header.path, header.offset, header.size_bytes, header.digest)
            async with aclosing(_data(messages)) as pieces:
                received = await self._stores.sessions.receive(header.upload_id, part, pieces)
        return store_pb2.UploadPartResponse(
            created=received.created, expire_time=_time(received.expire_time_us)
        )

    async def GetUpload(
        self, request: store_pb2.GetUploadRequest, context: Context
    ) -> store_pb2.GetUploadResponse:
        session = await self._stores.sessions.get(request.upload_id)
        return store_pb2.GetUploadResponse(
            files=_received_files(session),
            completed=session.outcome is not None,
            expire_time=_time(session.expire_time_us),
            max_part_bytes=MAX_PART_BYTES,
        )

    async def CompleteUpload(
        self, request: store_pb2.CompleteUploadRequest, context: Context
    ) -> store_pb2.CompleteUploadResponse:
        outcome = await self._stores.sessions.complete(request.upload_id)
        return store_pb2.CompleteUploadResponse(
            version=wire.version_to(outcome.version),
            created=outcome.created,
            feed_position=outcome.feed_position,
        )

    async def AbandonUpload(
        self, request: store_pb2.AbandonUploadRequest, context: Context
    ) -> store_pb2.AbandonUploadResponse:
        await self._stores.sessions.abandon(request.upload_id)
        return store_pb2.AbandonUploadResponse()


async def _data(messages: AsyncIterator[Piece]) -> AsyncGenerator[bytes]:
    async for message in messages:
        if message.WhichOneof("part") != "data":
            raise invalid_upload("after the header there must be data only")
        yield message.data


def _received_files(session: UploadSession) -> list[store_pb2.ReceivedFile]:
    if session.outcome is not None:
        return []
    return [
        store_pb2.ReceivedFile(
            path=file.path,
            ranges=[
                store_pb2.ByteRange(offset=offset, size_bytes=size)
                for offset, size in received_ranges(session.parts, index)
            ],
        )
        for index, file in enumerate(session.header.files)
    ]


def _time(time_us: int) -> Timestamp:
    time = Timestamp()
    time.FromMicroseconds(time_us)
    return time
