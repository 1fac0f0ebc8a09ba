"""Several stores over one database: what holds in one process must hold between them, by the database."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName
from adaptermesh.store.aliases import AliasName, MoveRequest
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.records import RouteRecord, RouteTarget
from adaptermesh.store.stores import StoreConfig, Stores
from tests.contract.store.test_catalogue import BASE, TENSORS, VERSION, changes, snapshot, version

PROD = AliasName(AdapterName("acme", "ner"), "prod")
SILENT = FeedConfig(heartbeat_seconds=1000.0)
"""Watchers hear nothing but wake-ups."""


@asynccontextmanager
async def open_stores(folder: Path, url: str, count: int, feed: FeedConfig) -> AsyncIterator[list[Stores]]:
    opened: list[Stores] = []
    async with AsyncExitStack() as around:
        for number in range(count):
            stores = Stores(StoreConfig(folder / str(number), DatabaseConfig(url), feed=feed), SystemClock())
            around.push_async_callback(stores.close)
            await stores.open()
            opened.append(stores)
        yield opened


def route(task: str) -> RouteRecord:
    return RouteRecord("*", task, (RouteTarget("base", 1, ""),), 0, 0)


@pytest.fixture
async def both(database_url: str, tmp_path: Path) -> AsyncIterator[list[Stores]]:
    async with open_stores(tmp_path, database_url, 2, FeedConfig(heartbeat_seconds=0.2)) as stores:
        await stores[0].catalogue.register_base_model(BASE)
        yield stores


@pytest.fixture
async def silent(postgres_url: str, tmp_path: Path) -> AsyncIterator[list[Stores]]:
    async with open_stores(tmp_path, postgres_url, 2, SILENT) as stores:
        yield stores


async def test_numbers_and_positions_have_no_gaps_between_stores(both: list[Stores]) -> None:
    wanted = [version(seed, name=name) for seed in range(10) for name in ("ner", "sql")]
    work = (both[n % 2].catalogue.publish(each, TENSORS) for n, each in enumerate(wanted))
    done = await asyncio.gather(*work)
    for name in ("ner", "sql"):
        numbers = [p.version.record.number for p in done if p.version.record.name == name]
        assert sorted(numbers) == list(range(1, 11))
    feed_id, head, _ = await snapshot(both[0])
    assert (feed_id, head) == (await snapshot(both[1]))[:2]
    for stores in both:
        positions = [change.position for change in await changes(stores, feed_id)]
        assert positions == list(range(1, head + 1)) == list(range(1, 22))


async def test_the_same_content_is_one_version_however_many_stores_publish_it(both: list[Stores]) -> None:
    for seed in range(20):
        wanted = replace(VERSION, digest=digest_bytes(str(seed).encode()))
        done = await asyncio.gather(*(stores.catalogue.publish(wanted, TENSORS) for stores in both * 2))
        assert sum(each.created for each in done) == 1
        assert {each.version.record.number for each in done} == {seed + 1}


async def test_of_stores_that_race_on_one_alias_exactly_one_wins(both: list[Stores]) -> None:
    await both[0].catalogue.publish(VERSION, TENSORS)
    for generation in range(50):
        moves = (stores.aliases.point(MoveRequest(PROD, generation), 1) for stores in both * 2)
        outcomes = await asyncio.gather(*moves, return_exceptions=True)
        losers = [outcome for outcome in outcomes if isinstance(outcome, MeshError)]
        assert len(losers) == len(outcomes) - 1
        for loser in losers:
            assert (loser.code, loser.reason) == (Code.ABORTED, Reason.ALIAS_CONFLICT)
            assert loser.metadata["generation"] == str(generation + 1)


async def test_of_stores_that_race_on_one_route_exactly_one_wins(both: list[Stores]) -> None:
    for generation in range(20):
        outcomes = await asyncio.gather(
            *(stores.routes.set(route("ner"), generation) for stores in both), return_exceptions=True
        )
        (loser,) = (outcome for outcome in outcomes if isinstance(outcome, BaseException))
        assert isinstance(loser, MeshError)
        assert loser.reason is Reason.ROUTE_CONFLICT


async def test_a_snapshot_of_one_store_and_the_feed_of_another_fit_together(both: list[Stores]) -> None:
    await asyncio.gather(*(both[n % 2].routes.set(route(f"task-{n}"), 0) for n in range(10)))
    feed_id, position, records = await snapshot(both[0])
    assert len(records) == 11
    await asyncio.gather(*(both[n % 2].routes.set(route(f"late-{n}"), 0) for n in range(10)))
    later = await changes(both[1], feed_id, position)
    assert [change.position for change in later] == list(range(position + 1, position + 11))


async def test_a_watcher_of_one_store_is_woken_by_the_other_and_by_its_own(silent: list[Stores]) -> None:
    writer, reader = silent
    feed_id, head, _ = await snapshot(reader)
    watch = reader.feed.watch(reader.database, feed_id, head)
    assert (await anext(watch)).change is None
    async with asyncio.timeout(60):
        for number in range(20):
            store = writer if number % 3 else reader
            _, position = await store.routes.set(route(f"task-{number}"), 0)
            message = await anext(watch)
            assert message.change is not None
            assert message.change.position == position
    await watch.aclose()


async def test_a_store_that_lost_its_ear_gets_it_back_and_looks_for_what_it_missed(
    silent: list[Stores], postgres_server: Any
) -> None:
    writer, reader = silent
    feed_id, head, _ = await snapshot(reader)
    watch = reader.feed.watch(reader.database, feed_id, head)
    assert (await anext(watch)).change is None
    async with asyncio.timeout(60):
        for number in range(3):
            # Every connection but the one that asks: the ears, and the pools.
            postgres_server.sql(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = 'adaptermesh-store'"
            )
            _, position = await eventually_written(writer, f"task-{number}")
            message = await anext(watch)
            assert message.change is not None
            assert message.change.position == position
    await watch.aclose()


async def eventually_written(stores: Stores, task: str) -> tuple[RouteRecord, int]:
    """A connection that was closed a moment ago may be found out by being used."""
    for _ in range(3):
        try:
            return await stores.routes.set(route(task), None)
        except MeshError as error:
            assert error.code is Code.UNAVAILABLE
            refused = error
    raise refused


async def test_stores_that_open_an_empty_database_at_once_agree_on_the_feed(
    bare_postgres_url: str, tmp_path: Path
) -> None:
    async def identity(folder: Path) -> str:
        async with open_stores(folder, bare_postgres_url, 1, SILENT) as stores:
            return (await snapshot(stores[0]))[0]

    assert len(set(await asyncio.gather(*(identity(tmp_path / str(n)) for n in range(4))))) == 1
