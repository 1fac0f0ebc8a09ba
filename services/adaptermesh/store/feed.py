"""The change feed: every mutation takes the next position, watchers read the table by position."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Row, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.store.access.audit import record_change
from adaptermesh.store.access.records import ApiKeyRecord, GrantRecord, NamespaceRecord, TenantRecord
from adaptermesh.store.database import Database
from adaptermesh.store.records import (
    AliasRecord,
    BaseModelRecord,
    Change,
    ChangeKind,
    DeletedVersion,
    PolicyRecord,
    Record,
    RouteRecord,
    VersionRecord,
)
from adaptermesh.store.schema import changes, feed

_BODIES: Mapping[ChangeKind, TypeAdapter[Any]] = {
    ChangeKind.BASE_MODEL_REGISTERED: TypeAdapter(BaseModelRecord),
    ChangeKind.VERSION_PUBLISHED: TypeAdapter(VersionRecord),
    ChangeKind.VERSION_STATUS_SET: TypeAdapter(VersionRecord),
    ChangeKind.VERSION_SIGNED: TypeAdapter(VersionRecord),
    ChangeKind.VERSION_DELETED: TypeAdapter(DeletedVersion),
    ChangeKind.NAMESPACE_POLICY_SET: TypeAdapter(PolicyRecord),
    ChangeKind.ALIAS_SET: TypeAdapter(AliasRecord),
    ChangeKind.ALIAS_DELETED: TypeAdapter(AliasRecord),
    ChangeKind.ROUTE_SET: TypeAdapter(RouteRecord),
    ChangeKind.ROUTE_DELETED: TypeAdapter(RouteRecord),
    ChangeKind.TENANT_SET: TypeAdapter(TenantRecord),
    ChangeKind.NAMESPACE_SET: TypeAdapter(NamespaceRecord),
    ChangeKind.GRANT_SET: TypeAdapter(GrantRecord),
    ChangeKind.GRANT_DELETED: TypeAdapter(GrantRecord),
    ChangeKind.API_KEY_SET: TypeAdapter(ApiKeyRecord),
}


async def append_change(connection: AsyncConnection, kind: ChangeKind, record: Record, now_us: int) -> int:
    """Writes a change, and who made it, inside the mutation's own transaction; returns its position.

    The update of the one feed row makes positions follow the order of the commits, without gaps.
    """
    take = update(feed).values(head_position=feed.c.head_position + 1).returning(feed.c.head_position)
    position = int((await connection.execute(take)).scalar_one())
    body = _BODIES[kind].dump_json(record).decode()
    row = {"position": position, "commit_time_us": now_us, "kind": kind.value, "body": body}
    await connection.execute(insert(changes).values(row))
    await record_change(connection, kind, record, position, now_us)
    return position


async def feed_head(connection: AsyncConnection) -> tuple[str, int]:
    """The feed's identity and its last position, as of the connection's transaction."""
    row = (await connection.execute(select(feed.c.feed_id, feed.c.head_position))).one()
    return row.feed_id, row.head_position


@dataclass(frozen=True, slots=True)
class FeedConfig:
    """How watchers are served."""

    heartbeat_seconds: float = 5.0
    """A watcher hears at least this often; changes of another process are found this late at most."""
    page_size: int = 128
    """How many changes a watcher has in memory at most."""


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """A change, or a heartbeat."""

    head_position: int
    change: Change | None


@dataclass(frozen=True, slots=True)
class FeedPage:
    """The next changes, none in a heartbeat."""

    head_position: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class FeedStatus:
    """How far the feed is and how far back it goes; without changes, `oldest_commit_time_us` is None."""

    feed_id: str
    head_position: int
    trimmed_position: int
    oldest_commit_time_us: int | None
    watchers: int


class Feed:
    """Watchers of the feed. Each keeps its own position; a wake-up carries no data, so none can be lost."""

    def __init__(self, config: FeedConfig) -> None:
        self._config = config
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._watchers)

    def announce(self) -> None:
        """Wakes the watchers; called after each commit."""
        for wake in self._watchers:
            wake.set()

    def close(self) -> None:
        """Ends every watch: a watcher goes on from its position at another time or place."""
        self._closed = True
        self.announce()

    async def status(self, database: Database) -> FeedStatus:
        """How far the feed is now."""
        async with database.reading() as connection:
            state = (await connection.execute(select(feed))).one()
            oldest = select(changes.c.commit_time_us).where(changes.c.position == state.trimmed_position + 1)
            time_us = (await connection.execute(oldest)).scalar()
        return FeedStatus(state.feed_id, state.head_position, state.trimmed_position, time_us, self.watchers)

    async def watch(
        self, database: Database, feed_id: str, after_position: int
    ) -> AsyncGenerator[FeedMessage]:
        """The changes of `pages`, one by one."""
        async with aclosing(self.pages(database, feed_id, after_position)) as pages:
            async for page in pages:
                for change in page.changes:
                    yield FeedMessage(page.head_position, change)
                if not page.changes:
                    yield FeedMessage(page.head_position, None)

    async def pages(self, database: Database, feed_id: str, after_position: int) -> AsyncGenerator[FeedPage]:
        """Yields every change after a position, in order, exactly once, then live, and heartbeats between.

        The first heartbeat comes as soon as the watcher has caught up. A watcher so slow that its next
        changes are trimmed meanwhile is told so, as one that comes too late: it never gets over a gap.

        Raises:
            MeshError: FEED_POSITION_EXPIRED if the position isn't one of this feed, or is not any more;
                DRAINING after close().
        """
        wake = asyncio.Event()
        self._watchers.add(wake)
        try:
            position = after_position
            # When the watcher is to hear something at the latest. A commit need not be a change.
            clock = asyncio.get_running_loop().time
            beat_at = 0.0
            while True:
                if self._closed:
                    raise unavailable(Reason.DRAINING, "the store is shutting down", retry_after=1.0)
                wake.clear()
                page = await self._read(database, feed_id, position)
                if page.changes:
                    yield page
                    position = page.changes[-1].position
                    # Heard, unless it has never heard that it has caught up.
                    beat_at = beat_at and clock() + self._config.heartbeat_seconds
                if position < page.head_position:
                    continue
                if not page.changes and clock() >= beat_at:
                    yield page
                    beat_at = clock() + self._config.heartbeat_seconds
                seconds = beat_at - clock()
                if seconds > 0:
                    await self._woken(wake, seconds)
        finally:
            self._watchers.discard(wake)

    async def _woken(self, wake: asyncio.Event, seconds: float) -> None:
        # Not `wait_for`: it forgets a cancellation that comes with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await wake.wait()

    async def _read(self, database: Database, feed_id: str, after: int) -> FeedPage:
        # One transaction sees both what is trimmed and what is there: what follows `after` is all there.
        async with database.reading() as connection:
            state = (await connection.execute(select(feed))).one()
            _check_position(state, feed_id, after)
            page = select(changes).where(changes.c.position > after).order_by(changes.c.position)
            rows = (await connection.execute(page.limit(self._config.page_size))).all()
        return FeedPage(state.head_position, tuple(_change(row) for row in rows))


def _check_position(state: Row[Any], feed_id: str, after: int) -> None:
    if after < 0:
        raise invalid_field("after_position", "must not be negative")
    if feed_id == state.feed_id and state.trimmed_position <= after <= state.head_position:
        return
    raise MeshError(
        Code.OUT_OF_RANGE,
        Reason.FEED_POSITION_EXPIRED,
        f"position {after} of feed '{feed_id[:80]}' is not one of this feed: take a snapshot",
        metadata={
            "feed_id": state.feed_id,
            "head_position": str(state.head_position),
            "trimmed_position": str(state.trimmed_position),
            "after_position": str(after),
        },
    )


def _change(row: Row[Any]) -> Change:
    kind = ChangeKind(row.kind)
    return Change(row.position, row.commit_time_us, kind, _BODIES[kind].validate_json(row.body))
