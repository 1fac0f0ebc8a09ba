"""The part of the store's gRPC face that is about the change feed."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.store import feed_wire
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.feed import FeedPage
from adaptermesh.store.with_stores import WithStores

Context = Any

# Well below the largest message that clients take, of which one change has far less.
_BATCH_BYTES = 512 * 1024
_KEY_SECONDS = 5.0


class FeedServicer(WithStores, store_pb2_grpc.StoreServiceServicer):
    """Watches and the feed's status. Errors are raised as `MeshError`."""

    async def WatchChanges(
        self, request: store_pb2.WatchChangesRequest, context: Context
    ) -> AsyncIterator[store_pb2.WatchChangesResponse]:
        answers = _batches if request.batched else _singles
        feed, database = self._stores.feed, self._stores.database
        clock, caller = asyncio.get_running_loop().time, current_caller.get()
        asked_at = clock()
        async with aclosing(feed.pages(database, request.feed_id, request.after_position)) as pages:
            async for page in pages:
                if clock() - asked_at >= _KEY_SECONDS:
                    # It lasts for longer than a key may.
                    await self._stores.authentication.check_again(caller)
                    asked_at = clock()
                for answer in answers(page):
                    yield answer

    async def GetFeedStatus(
        self, request: store_pb2.GetFeedStatusRequest, context: Context
    ) -> store_pb2.GetFeedStatusResponse:
        return feed_wire.feed_status_to(await self._stores.feed.status(self._stores.database))


def _singles(page: FeedPage) -> Iterator[store_pb2.WatchChangesResponse]:
    """A message for each change, or a heartbeat."""
    for change in page.changes:
        message = feed_wire.change_to(change)
        yield store_pb2.WatchChangesResponse(head_position=page.head_position, change=message)
    if not page.changes:
        yield store_pb2.WatchChangesResponse(head_position=page.head_position)


def _batches(page: FeedPage) -> Iterator[store_pb2.WatchChangesResponse]:
    """The changes in as few messages as they fit into, or a heartbeat."""
    answer, size = store_pb2.WatchChangesResponse(head_position=page.head_position), 0
    for change in page.changes:
        if size >= _BATCH_BYTES:
            yield answer
            answer, size = store_pb2.WatchChangesResponse(head_position=page.head_position), 0
        message = feed_wire.change_to(change)
        answer.changes.append(message)
        size += message.ByteSize()
    yield answer
