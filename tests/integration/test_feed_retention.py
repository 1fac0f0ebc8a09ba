"""The feed's retention with real processes: kill -9 in the middle, and a real router that comes too late."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.router.catalogue import Catalogue
from adaptermesh.router.feed import FeedFollower, FeedMessage, SnapshotPart
from adaptermesh.router.settings import RouterSettings
from adaptermesh.router.store_client import StoreClient
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.retention import FeedTrimmer, RetentionConfig
from adaptermesh.store.schema import changes, feed
from adaptermesh.testing.polling import eventually
from tests.integration.store_process import Place, StoreProcess

CHANGES = 150_000
KEPT = 500
ROUNDS = 5


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Database]:
    """The store's database, seen from beside it."""
    database = Database(DatabaseConfig(place.database_url or place.catalogue), lambda: None)
    await database.open("the-feed")
    try:
        yield database
    finally:
        await database.close()


async def fill(connection: AsyncConnection) -> None:
    await connection.execute(update(feed).values(head_position=CHANGES))
    body = '{"tenant":"*","task":"x","targets":[],"generation":2,"update_time_us":2}'
    now_us = int(time.time() * 1e6)
    row = {"commit_time_us": now_us, "kind": "route_deleted", "body": body}
    for start in range(1, CHANGES, 10_000):
        rows = [{**row, "position": number} for number in range(start, start + 10_000)]
        await connection.execute(insert(changes), rows)


async def trimmed_and_kept(database: Database) -> tuple[int, int, int]:
    """The trimmed position, how many changes are there, and the first one."""
    async with database.reading() as connection:
        trimmed = (await connection.execute(select(feed.c.trimmed_position))).scalar_one()
        query = select(func.count(), func.min(changes.c.position))
        count, first = (await connection.execute(query)).one()
    return trimmed, count, first


async def reached(database: Database, position: int) -> None:
    async def look() -> bool:
        return (await trimmed_and_kept(database))[0] >= position

    await eventually(look, within=120)


async def test_a_store_killed_while_it_trims_loses_no_change_that_the_feed_promises(
    database_url: str, tmp_path: Path
) -> None:
    url = "" if database_url.startswith("sqlite") else database_url
    bounds = {"FEED_MAX_CHANGES": str(KEPT), "FEED_MIN_CHANGES": "0"}
    place = replace(Place.new(tmp_path), database_url=url, settings=bounds)
    draw = random.Random(1)
    async with opened(place) as database:
        await database.write(fill)
        for number in range(1, ROUNDS + 1):
            store = await StoreProcess.start(place)
            point = CHANGES - KEPT if number == ROUNDS else number * 25_000 + draw.randrange(10_000)
            await reached(database, point)
            store.kill()
            await store.gone()
            trimmed, count, first = await trimmed_and_kept(database)
            assert (first, count) == (trimmed + 1, CHANGES - trimmed)
        assert trimmed == CHANGES - KEPT


class CutFeed(StoreClient):
    """A real store's feed, of which the first watch ends when it is told to."""

    def __init__(self, store: StoreProcess, settings: RouterSettings) -> None:
        super().__init__(store.channel, settings)
        self.cut = asyncio.Event()
        self.watches: list[int] = []
        self.snapshots = 0

    async def snapshot(self) -> AsyncGenerator[SnapshotPart, None]:
        self.snapshots += 1
        async for part in super().snapshot():
            yield part

    async def watch(self, feed_id: str, after: int) -> AsyncGenerator[FeedMessage, None]:
        self.watches.append(after)
        async for message in super().watch(feed_id, after):
            yield message
            if len(self.watches) == 1:
                await self.cut.wait()
                return


async def test_a_router_that_comes_back_too_late_takes_a_snapshot_and_goes_on(tmp_path: Path) -> None:
    place = Place.new(tmp_path)
    store = await StoreProcess.start(place)
    settings, catalogue = RouterSettings(), Catalogue()
    feed_of_store = CutFeed(store, settings)
    follower = FeedFollower(feed_of_store, catalogue, settings, random.Random(1))

    async def set_route(task: str) -> None:
        targets = [adapter_pb2.RouteTarget(ref="base", weight=1)]
        route = adapter_pb2.Route(tenant="*", task=task, targets=targets)
        await store.stub.SetRoute(store_pb2.SetRouteRequest(route=route))

    async def caught_up(position: int) -> None:
        async def look() -> bool:
            return follower.connected and catalogue.position == position

        await eventually(look, within=60)

    async with asyncio.TaskGroup() as group:
        await set_route("first")
        following = group.create_task(follower.run())
        await caught_up(1)
        for number in range(20):
            await set_route(f"task-{number}")
        async with opened(place) as database:
            bounds = RetentionConfig(max_changes=5, min_changes=0)
            assert await FeedTrimmer(bounds, database, SystemClock()).trim() == 16
        feed_of_store.cut.set()
        await caught_up(21)
        assert (feed_of_store.snapshots, feed_of_store.watches) == (2, [1, 1, 21])
        await set_route("last")
        await caught_up(22)
        assert catalogue.image is not None
        wanted = {"first", "last", *(f"task-{number}" for number in range(20))}
        assert {task for _, task in catalogue.image.routes} == wanted
        following.cancel()
    store.kill()
    await store.gone()


@pytest.mark.parametrize("batched", [False, True])
async def test_what_is_watched_over_many_batches_comes_whole(tmp_path: Path, *, batched: bool) -> None:
    place = Place.new(tmp_path)
    async with opened(place) as database:
        await database.write(fill)
    store = await StoreProcess.start(place)
    request = store_pb2.WatchChangesRequest(feed_id="the-feed", batched=batched)
    expected = 1
    async for message in store.stub.WatchChanges(request):
        for change in message.changes if batched else [message.change]:
            assert change.position == expected
            expected += 1
        if expected > 3000:
            break
    store.kill()
    await store.gone()
