"""The store's feed over gRPC."""

from collections.abc import AsyncGenerator

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.errors import Reason
from adaptermesh.router import wire
from adaptermesh.router.feed import FeedMessage, SnapshotPart
from adaptermesh.router.settings import RouterSettings
from adaptermesh.rpc.status import mesh_error_from


class StoreClient:
    """Implements `StoreFeed`."""

    def __init__(self, channel: grpc.aio.Channel, settings: RouterSettings) -> None:
        self._stub: store_pb2_grpc.StoreServiceAsyncStub = store_pb2_grpc.StoreServiceStub(channel)
        self._snapshot_timeout = settings.snapshot_timeout_seconds

    async def snapshot(self) -> AsyncGenerator[SnapshotPart, None]:
        call = self._stub.GetSnapshot(store_pb2.GetSnapshotRequest(), timeout=self._snapshot_timeout)
        try:
            async for message in call:
                yield wire.snapshot_part(message)
        except grpc.aio.AioRpcError as error:
            raise mesh_error_from(error, Reason.STORE_UNREACHABLE) from error
        finally:
            call.cancel()

    async def watch(self, feed_id: str, after: int) -> AsyncGenerator[FeedMessage, None]:
        # No deadline: the call lasts as long as messages come, which the follower times.
        request = store_pb2.WatchChangesRequest(feed_id=feed_id, after_position=after, batched=True)
        call = self._stub.WatchChanges(request)
        try:
            async for message in call:
                for part in wire.feed_messages(message):
                    yield part
        except grpc.aio.AioRpcError as error:
            raise mesh_error_from(error, Reason.STORE_UNREACHABLE) from error
        finally:
            call.cancel()
