"""The feed's retention: what goes, what stays, and that nobody ever gets over a gap."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.records import RouteRecord, RouteTarget
from adaptermesh.store.retention import FeedTrimmer, RetentionConfig
from adaptermesh.store.schema import changes, feed
from adaptermesh.store.stores import StoreConfig, Stores

DAY = 24 * 3600.0


@dataclass
class ManualClock(SystemClock):
    """Goes on when it is told to."""

    now: float = 1e9

    def wall(self) -> float:
        return self.now


def route(task: str) -> RouteRecord:
    return RouteRecord("*", task, (RouteTarget("base", 1, ""),), 0, 0)


async def write(stores: Stores, count: int) -> None:
    for number in range(count):
        await stores.routes.set(route(f"task-{number % 3}"), None)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def both(database_url: str, tmp_path: Path, clock: ManualClock) -> AsyncIterator[list[Stores]]:
    """Two stores over one database, with a clock that stands still: they trim nothing by themselves."""
    async with AsyncExitStack() as around:
        opened = []
        for number in range(2):
            config = StoreConfig(
                tmp_path / str(number),
                DatabaseConfig(database_url),
                feed=FeedConfig(heartbeat_seconds=0.2, page_size=4),
            )
            stores = Stores(config, clock)
            around.push_async_callback(stores.close)
            await stores.open()
            opened.append(stores)
        yield opened


def trimmer(stores: Stores, clock: ManualClock, **values: Any) -> FeedTrimmer:
    config = RetentionConfig(max_age_seconds=30 * DAY, max_changes=1000, min_changes=0, batch_size=3)
    return FeedTrimmer(replace(config, **values), stores.database, clock)


async def kept(stores: Stores) -> tuple[int, list[int]]:
    """The trimmed position, and the positions of the changes that are there."""
    async with stores.database.reading() as connection:
        trimmed = (await connection.execute(select(feed.c.trimmed_position))).scalar_one()
        rows = await connection.execute(select(changes.c.position).order_by(changes.c.position))
        return trimmed, [row.position for row in rows]


async def test_changes_leave_the_feed_when_they_are_too_old(both: list[Stores], clock: ManualClock) -> None:
    stores = both[0]
    await write(stores, 7)
    clock.now += 20 * DAY
    await write(stores, 5)
    assert await trimmer(stores, clock).trim() == 0
    clock.now += 10 * DAY + 1
    assert await trimmer(stores, clock).trim() == 7
    assert await kept(stores) == (7, [8, 9, 10, 11, 12])
    status = await stores.feed.status(stores.database)
    assert (status.head_position, status.trimmed_position) == (12, 7)
    assert status.oldest_commit_time_us == int((1e9 + 20 * DAY) * 1e6)
    clock.now += 30 * DAY
    assert await trimmer(stores, clock).trim() == 5
    assert await kept(stores) == (12, [])
    assert (await stores.feed.status(stores.database)).oldest_commit_time_us is None
    await write(stores, 1)
    assert await kept(stores) == (12, [13])


async def test_changes_leave_the_feed_when_they_are_too_many(both: list[Stores], clock: ManualClock) -> None:
    await write(both[0], 12)
    assert await trimmer(both[0], clock, max_changes=4).trim() == 8
    assert await kept(both[0]) == (8, [9, 10, 11, 12])


async def test_the_last_changes_stay_however_old_they_are(both: list[Stores], clock: ManualClock) -> None:
    await write(both[0], 12)
    clock.now += 300 * DAY
    assert await trimmer(both[0], clock, min_changes=5).trim() == 7
    assert await trimmer(both[0], clock, min_changes=20).trim() == 0
    assert await kept(both[0]) == (7, [8, 9, 10, 11, 12])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ages=st.lists(st.integers(0, 60), max_size=20),
    trimmed=st.integers(0, 20),
    max_changes=st.integers(1, 25),
    min_changes=st.integers(0, 25),
    batch_size=st.integers(1, 7),
)
async def test_what_stays_is_what_the_rule_says_for_any_ages_and_bounds(
    both: list[Stores],
    clock: ManualClock,
    ages: Sequence[int],
    trimmed: int,
    max_changes: int,
    min_changes: int,
    batch_size: int,
) -> None:
    stores, head = both[0], trimmed + len(ages)

    async def fill(connection: AsyncConnection) -> None:
        await connection.execute(delete(changes))
        await connection.execute(update(feed).values(head_position=head, trimmed_position=trimmed))
        for position, age in enumerate(ages, trimmed + 1):
            row = {"commit_time_us": int((clock.now - age * DAY) * 1e6), "kind": "route_set", "body": "{}"}
            await connection.execute(insert(changes).values(position=position, **row))

    await stores.database.write(fill)
    expected = trimmed
    for position, age in enumerate(ages, trimmed + 1):
        too_many = head - position >= max_changes
        too_old = age > 30 and head - position >= min_changes
        if not (too_many or too_old):
            break
        expected = position
    bounds = {"max_changes": max_changes, "min_changes": min_changes, "batch_size": batch_size}
    assert await trimmer(stores, clock, **bounds).trim() == expected - trimmed
    assert await kept(stores) == (expected, list(range(expected + 1, head + 1)))
    assert await trimmer(stores, clock, **bounds).trim() == 0


async def test_a_feed_with_nothing_to_trim_keeps_no_writer_waiting(
    both: list[Stores], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(both[0], 3)
    monkeypatch.setattr(both[0].database, "write", None)
    assert await trimmer(both[0], clock).trim() == 0


async def test_stores_that_trim_at_once_trim_each_change_once(both: list[Stores], clock: ManualClock) -> None:
    await write(both[0], 40)
    done = await asyncio.gather(*(trimmer(stores, clock, max_changes=10).trim() for stores in both * 2))
    assert sum(done) == 30
    assert await kept(both[0]) == (30, list(range(31, 41)))


async def test_a_watcher_whose_next_changes_are_trimmed_is_told_and_gets_over_no_gap(
    both: list[Stores], clock: ManualClock
) -> None:
    stores = both[0]
    await write(stores, 12)
    feed_id = (await stores.feed.status(stores.database)).feed_id
    watch = stores.feed.watch(stores.database, feed_id, 0)
    seen = []
    # It is in the middle of its first page when all that it has not read goes.
    for _ in range(2):
        message = await anext(watch)
        assert message.change is not None
        seen.append(message.change.position)
    await trimmer(both[1], clock, max_changes=2).trim()
    with pytest.raises(MeshError) as caught:
        async for message in watch:
            assert message.change is not None
            seen.append(message.change.position)
    assert (caught.value.code, caught.value.reason) == (Code.OUT_OF_RANGE, Reason.FEED_POSITION_EXPIRED)
    assert caught.value.metadata["trimmed_position"] == "10"
    assert seen == [1, 2, 3, 4]
    # What it is told to do helps: the snapshot is where changes are.
    items = [item async for item in stores.snapshots.read()]
    later = stores.feed.watch(stores.database, feed_id, items[0].feed_position)
    assert (await anext(later)).change is None
    await later.aclose()


async def test_watchers_see_every_change_once_or_are_told_while_stores_write_and_trim(
    both: list[Stores], clock: ManualClock
) -> None:
    feed_id = (await both[0].feed.status(both[0].database)).feed_id
    writing = asyncio.Event()

    async def trim(stores: Stores) -> None:
        while not writing.is_set():
            await trimmer(stores, clock, max_changes=6).trim()
            await asyncio.sleep(0)

    async def watch(stores: Stores, pauses: int) -> int:
        position, told = 0, 0
        while position < 80:
            watching = stores.feed.watch(stores.database, feed_id, position)
            try:
                async for message in watching:
                    if message.change is not None:
                        assert message.change.position == position + 1
                        position += 1
                    if position >= 80:
                        break
                    for _ in range(pauses):
                        await asyncio.sleep(0.001)
            except MeshError as error:
                assert error.reason is Reason.FEED_POSITION_EXPIRED
                told += 1
                items = [item async for item in stores.snapshots.read()]
                assert items[0].feed_position > position
                position = items[0].feed_position
            finally:
                await watching.aclose()
        return told

    async with asyncio.TaskGroup() as group:
        trimming = [group.create_task(trim(stores)) for stores in both]
        watchers = [group.create_task(watch(both[n % 2], n * 5)) for n in range(4)]
        await asyncio.gather(*(write(stores, 40) for stores in both))
        await asyncio.gather(*watchers)
        writing.set()
        await asyncio.gather(*trimming)


async def test_a_store_trims_by_itself(
    config: StoreConfig, kit: Any, database_url: str, tmp_path: Path
) -> None:
    async with kit.running_store(config) as store:
        await write(store.stores, 10)
    bounds = RetentionConfig(max_changes=3, min_changes=0)
    async with kit.running_store(replace(config, retention=bounds)) as store:
        await until_trimmed(store, 7)


async def until_trimmed(store: Any, position: int) -> None:
    async with asyncio.timeout(30):
        while True:
            status = await store.stub.GetFeedStatus(store_pb2.GetFeedStatusRequest())
            if status.trimmed_position == position:
                break
            await asyncio.sleep(0.02)
    assert status.head_position == 10
    assert status.watchers == 0
    assert status.oldest_commit_time.ToMicroseconds() > 0
