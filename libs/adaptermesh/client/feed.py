"""The call about the store's change feed."""

import datetime

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client.mesh_records import FeedStatus
from adaptermesh.client.store_connection import StoreConnection


class FeedCalls(StoreConnection):
    """The part of the store's client that asks how far the change feed is."""

    async def feed_status(self) -> FeedStatus:
        """How far the change feed is, and how far back it goes."""
        found = await self._call(self._stub.GetFeedStatus, store_pb2.GetFeedStatusRequest())
        oldest = None
        if found.HasField("oldest_commit_time"):
            oldest = found.oldest_commit_time.ToDatetime(datetime.UTC)
        return FeedStatus(found.feed_id, found.head_position, found.trimmed_position, oldest, found.watchers)
