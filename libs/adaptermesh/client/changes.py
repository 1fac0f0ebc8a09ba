"""The change feed as a client follows it: from a position or a snapshot on, over lost connections."""

import asyncio
import datetime
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import access_wire, wire
from adaptermesh.client.access_records import ApiKey, Grant, Namespace, Tenant
from adaptermesh.client.feed import FeedCalls
from adaptermesh.client.integrity_records import NamespacePolicy
from adaptermesh.client.records import Alias, BaseModel, DeletedVersion, Route, Version
from adaptermesh.core.backoff import Backoff
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable

ChangeRecord = (
    Version
    | DeletedVersion
    | Alias
    | Route
    | BaseModel
    | NamespacePolicy
    | Tenant
    | Namespace
    | Grant
    | ApiKey
)

# A store says something at least every 5 seconds, unless it is set to another time.
_SILENCE_SECONDS = 30.0
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 5.0

_RECORDS: Mapping[str, Callable[[Any], ChangeRecord]] = {
    "base_model_registered": wire.base_model_of,
    "version_published": wire.version_of,
    "version_status_set": wire.version_of,
    "version_signed": wire.version_of,
    "version_deleted": wire.deleted_of,
    "alias_set": wire.alias_of,
    "alias_deleted": wire.alias_of,
    "route_set": wire.route_of,
    "route_deleted": wire.route_of,
    "namespace_policy_set": wire.policy_record_of,
    "tenant_set": access_wire.tenant_of,
    "namespace_set": access_wire.namespace_of,
    "grant_set": access_wire.grant_of,
    "grant_deleted": access_wire.grant_of,
    "api_key_set": access_wire.key_of,
}
CHANGE_KINDS = tuple(_RECORDS)
_SNAPSHOT_KINDS = {
    "base_models": "base_model_registered",
    "versions": "version_published",
    "deleted_versions": "version_deleted",
    "aliases": "alias_set",
    "policies": "namespace_policy_set",
    "namespaces": "namespace_set",
    "grants": "grant_set",
    "routes": "route_set",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One mutation, or, without a time, what a snapshot shows as of its position.

    `kind` is one of `CHANGE_KINDS`; of a newer store it may be "unknown", with a record of None.
    """

    position: int
    time: datetime.datetime | None
    kind: str
    record: ChangeRecord | None


@dataclass(frozen=True, slots=True)
class FeedPlace:
    """A place in a feed; `feed_id` says which catalogue it belongs to."""

    feed_id: str
    position: int


class ChangeCalls(FeedCalls):
    """The part of the store's client that follows what changes."""

    async def feed_head(self) -> FeedPlace:
        """The feed's last position now."""
        status = await self.feed_status()
        return FeedPlace(status.feed_id, status.head_position)

    async def snapshot(self) -> AsyncGenerator[Change]:
        """Everything that is there, as of one position; its records are not kept here."""
        call = self._stub.GetSnapshot(store_pb2.GetSnapshotRequest(), timeout=self.deadlines.transfer_seconds)
        try:
            async for part in call:
                for field, kind in _SNAPSHOT_KINDS.items():
                    for message in getattr(part, field):
                        yield Change(part.feed_position, None, kind, _RECORDS[kind](message))
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def changes(
        self, after: FeedPlace, *, follow: bool = True, on_loss: Callable[[MeshError], None] | None = None
    ) -> AsyncGenerator[Change]:
        """Every change after a place, in order, exactly once; with `follow` for ever, else up to the last.

        A lost connection is opened again from the last change that came, however long that takes; `on_loss`
        hears of each. What can't be resumed is raised: OUT_OF_RANGE (FEED_POSITION_EXPIRED) if the changes
        after the place are gone, and any failure before the first message.
        """
        place = after
        backoff = Backoff(_FIRST_PAUSE, _LAST_PAUSE, random.Random())  # noqa: S311 (no secret)
        connected = False
        while True:
            try:
                async with aclosing(self._watch(place)) as messages:
                    async for message in messages:
                        connected = True
                        backoff.reset()
                        if message.HasField("change"):
                            place = FeedPlace(place.feed_id, message.change.position)
                            yield _change_of(message.change)
                        if not follow and place.position >= message.head_position:
                            return
                lost = unavailable(Reason.STORE_UNREACHABLE, "the store ended the feed", retry_after=1.0)
            except MeshError as error:
                if not connected or error.code not in (Code.UNAVAILABLE, Code.CANCELLED):
                    raise
                lost = error
            if on_loss is not None:
                on_loss(lost)
            await asyncio.sleep(backoff.next_delay())

    async def _watch(self, after: FeedPlace) -> AsyncGenerator[store_pb2.WatchChangesResponse]:
        request = store_pb2.WatchChangesRequest(feed_id=after.feed_id, after_position=after.position)
        # No deadline: it lasts for as long as messages come, each of which has its own.
        call = self._stub.WatchChanges(request)
        messages = aiter(call)
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await anext(messages, None)
                if message is None:
                    return
                yield message
        except TimeoutError as error:
            message_text = f"nothing came from {self.target} for {_SILENCE_SECONDS:g} s"
            raise unavailable(Reason.STORE_UNREACHABLE, message_text, retry_after=1.0) from error
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()


def _change_of(message: store_pb2.Change) -> Change:
    kind = message.WhichOneof("event") or "unknown"
    record = _RECORDS[kind](getattr(message, kind)) if kind in _RECORDS else None
    return Change(message.position, wire.time_of(message.commit_time), kind, record)
