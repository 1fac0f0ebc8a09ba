"""The call about how often versions were downloaded."""

from collections.abc import Sequence

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client.store_connection import StoreConnection

_AT_ONCE = 1000


class DownloadCalls(StoreConnection):
    """The part of the store's client that asks for download counts."""

    async def download_counts(self, digests: Sequence[str]) -> list[int]:
        """How often each of these versions was downloaded; the last seconds may be missing."""
        counts: list[int] = []
        for start in range(0, len(digests), _AT_ONCE):
            request = store_pb2.GetDownloadCountsRequest(digests=digests[start : start + _AT_ONCE])
            counts += (await self._call(self._stub.GetDownloadCounts, request)).counts
        return counts
