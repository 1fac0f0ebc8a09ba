"""Store processes over one PostgreSQL, which is killed, as they are."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.testing.polling import eventually
from tests.integration.store_process import (
    Place,
    StoreProcess,
    adapter_files,
    base_model,
    upload_messages,
)
from tests.postgres import PostgresServer, running_postgres

DATABASE = "mesh"
# Watchers of these stores hear nothing but wake-ups.
NO_HEARTBEAT = "1000"
CALL_SECONDS = 60.0
RETRY_SECONDS = 0.02
ROUNDS = 3
RACES = 300


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """One that a test may kill, and whose commits wait for the disk."""
    with running_postgres(durable=True) as server:
        server.sql(f"CREATE DATABASE {DATABASE}")
        yield server


@asynccontextmanager
async def store_processes(
    server: PostgresServer, folder: Path, count: int
) -> AsyncIterator[list[StoreProcess]]:
    async with AsyncExitStack() as around:
        stores = []
        for number in range(count):
            stores.append(await start(server, folder / str(number)))
            around.push_async_callback(end, stores[-1])
        yield stores


async def start(server: PostgresServer, home: Path) -> StoreProcess:
    settings = {"HEARTBEAT_SECONDS": NO_HEARTBEAT}
    return await StoreProcess.start(Place(home, database_url=server.url(DATABASE), settings=settings))


async def end(store: StoreProcess) -> None:
    store.kill()
    await store.gone()


def route(task: str) -> store_pb2.SetRouteRequest:
    target = adapter_pb2.RouteTarget(ref="base", weight=1)
    return store_pb2.SetRouteRequest(route=adapter_pb2.Route(tenant="*", task=task, targets=[target]))


async def head_of(store: StoreProcess) -> tuple[str, int]:
    async for part in store.stub.GetSnapshot(store_pb2.GetSnapshotRequest()):
        return part.feed_id, part.feed_position
    raise AssertionError("a snapshot has a first part")


@dataclass
class Writer:
    """Sets routes for ever, and again after a refusal."""

    name: str
    store: StoreProcess
    acknowledged: dict[int, adapter_pb2.Route] = field(default_factory=dict)
    refusals: list[MeshError] = field(default_factory=list)

    async def run(self) -> None:
        number = 0
        while True:
            try:
                request = route(f"{self.name}-{number % 7}")
                done = await self.store.stub.SetRoute(request, timeout=CALL_SECONDS)
                self.acknowledged[done.feed_position] = done.route
                number += 1
            except grpc.aio.AioRpcError as error:
                self.refusals.append(mesh_error_from(error))
                await asyncio.sleep(RETRY_SECONDS)


@dataclass
class Watcher:
    """Follows the feed from its position, over every interruption."""

    store: StoreProcess
    feed_id: str
    position: int = 0
    changes: list[store_pb2.Change] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            request = store_pb2.WatchChangesRequest(feed_id=self.feed_id, after_position=self.position)
            call = self.store.stub.WatchChanges(request)
            try:
                async for message in call:
                    if message.HasField("change"):
                        assert message.change.position == self.position + 1
                        self.position += 1
                        self.changes.append(message.change)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def at_work(*workers: Writer | Watcher) -> AsyncIterator[None]:
    """All of them run meanwhile; a failure of one is the test's."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.run()) for worker in workers]
        yield
        for task in tasks:
            task.cancel()


async def until_acknowledged(writers: list[Writer], more: int) -> None:
    wanted = [len(writer.acknowledged) + more for writer in writers]

    async def look() -> bool:
        counts = [len(writer.acknowledged) for writer in writers]
        return all(count >= least for count, least in zip(counts, wanted, strict=True))

    await eventually(look, within=60)


def assert_all_there(writers: list[Writer], changes: list[store_pb2.Change]) -> None:
    assert [change.position for change in changes] == list(range(1, len(changes) + 1))
    for writer in writers:
        for position, kept in writer.acknowledged.items():
            assert changes[position - 1].route_set == kept


async def test_kill_9_of_the_database_loses_nothing_and_the_stores_recover_by_themselves(
    server: PostgresServer, tmp_path: Path
) -> None:
    async with store_processes(server, tmp_path, 2) as stores:
        feed_id, _ = await head_of(stores[0])
        writers = [Writer(f"writer-{n}", stores[n % 2]) for n in range(4)]
        watchers = [Watcher(store, feed_id) for store in stores]
        async with at_work(*writers, *watchers):
            for _ in range(ROUNDS):
                await until_acknowledged(writers, 20)
                server.kill()
                known = [len(writer.refusals) for writer in writers]

                async def all_refused(known: list[int] = known) -> bool:
                    return all(len(w.refusals) > n + 2 for w, n in zip(writers, known, strict=True))

                await eventually(all_refused, within=60)
                server.start()
            await until_acknowledged(writers, 20)
        last = Writer("last", stores[0])
        async with at_work(*watchers):
            async with at_work(last):
                await until_acknowledged([last], 1)
            _, head = await head_of(stores[1])

            async def caught_up() -> bool:
                return all(watcher.position >= head for watcher in watchers)

            await eventually(caught_up, within=60)
        assert watchers[0].changes[:head] == watchers[1].changes[:head]
        for watcher in watchers:
            assert_all_there([*writers, last], watcher.changes)
        for refusal in (refusal for writer in writers for refusal in writer.refusals):
            assert refusal.code is Code.UNAVAILABLE, refusal
            assert refusal.reason in (Reason.STORE_UNREACHABLE, Reason.OVERLOADED), refusal
            assert refusal.retry_after
            assert server.url(DATABASE) not in str(refusal)


async def test_of_two_stores_that_race_on_one_alias_exactly_one_wins_every_time(
    server: PostgresServer, tmp_path: Path
) -> None:
    async with store_processes(server, tmp_path, 2) as stores:
        await stores[0].stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        await stores[0].stub.UploadAdapter(upload_messages("ner", adapter_files(1)))
        for generation in range(RACES):
            request = store_pb2.SetAliasRequest(
                namespace="acme",
                name="ner",
                alias="prod",
                version_number=1,
                expected_generation=generation,
            )
            calls = (store.stub.SetAlias(request, timeout=CALL_SECONDS) for store in stores)
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            won = [outcome for outcome in outcomes if isinstance(outcome, store_pb2.SetAliasResponse)]
            lost = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
            assert (len(won), len(lost)) == (1, 1)
            assert won[0].alias.generation == generation + 1
            refusal = mesh_error_from(lost[0])
            assert (refusal.code, refusal.reason) == (Code.ABORTED, Reason.ALIAS_CONFLICT)
            assert refusal.metadata["generation"] == str(generation + 1)


async def test_kill_9_of_a_store_in_the_middle_of_a_write_leaves_no_lock_and_no_half_write(
    server: PostgresServer, tmp_path: Path
) -> None:
    engine = create_async_engine(server.url(DATABASE), poolclass=NullPool)
    async with store_processes(server, tmp_path, 2) as (victim, other):
        async with engine.connect() as blocker, engine.connect() as observer:
            await blocker.execute(text("LOCK TABLE routes IN SHARE MODE"))
            writing = asyncio.ensure_future(victim.stub.SetRoute(route("half"), timeout=CALL_SECONDS))

            async def in_the_middle() -> bool:
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                found = (await observer.execute(text(waiting))).scalar_one()
                await observer.rollback()
                return bool(found)

            await eventually(in_the_middle)
            victim.kill()
            assert isinstance(
                (await asyncio.gather(writing, return_exceptions=True))[0], grpc.aio.AioRpcError
            )
            after = asyncio.ensure_future(other.stub.SetRoute(route("whole"), timeout=CALL_SECONDS))
            await blocker.rollback()
            assert (await after).feed_position == 1
        routes = (await other.stub.ListRoutes(store_pb2.ListRoutesRequest())).routes
        assert [found.task for found in routes] == ["whole"]
    await engine.dispose()


async def test_kill_9_of_a_store_that_writes_is_not_noticed_by_the_other(
    server: PostgresServer, tmp_path: Path
) -> None:
    async with store_processes(server, tmp_path, 1) as (other,):
        feed_id, _ = await head_of(other)
        steady, watcher = Writer("steady", other), Watcher(other, feed_id)
        writers = [steady]
        async with at_work(watcher):
            async with at_work(steady):
                for number in range(ROUNDS):
                    victim = await start(server, tmp_path / "victim")
                    doomed = [Writer(f"doomed-{number}-{n}", victim) for n in range(4)]
                    writers += doomed
                    async with at_work(*doomed):
                        await until_acknowledged([*doomed, steady], 10)
                        victim.kill()
                        await until_acknowledged([steady], 10)
                    await victim.gone()
            _, head = await head_of(other)

            async def caught_up() -> bool:
                return watcher.position >= head

            await eventually(caught_up)
        assert steady.refusals == []
        assert_all_there(writers, watcher.changes)


async def test_a_watcher_at_one_store_hears_at_once_what_was_written_at_the_other(
    server: PostgresServer, tmp_path: Path
) -> None:
    async with store_processes(server, tmp_path, 2) as (writer, reader):
        feed_id, head = await head_of(reader)
        watch = reader.stub.WatchChanges(
            store_pb2.WatchChangesRequest(feed_id=feed_id, after_position=head), timeout=CALL_SECONDS
        )
        await watch.read()
        for number in range(20):
            done = await writer.stub.SetRoute(route(f"task-{number}"))
            message = await watch.read()
            assert isinstance(message, store_pb2.WatchChangesResponse)
            assert (message.change.position, message.change.route_set) == (done.feed_position, done.route)
        watch.cancel()


async def test_sigterm_ends_a_store_whose_database_has_gone(server: PostgresServer, tmp_path: Path) -> None:
    async with store_processes(server, tmp_path, 1) as (store,):
        await head_of(store)
        server.kill()
        store.process.terminate()
        await asyncio.to_thread(store.process.wait, timeout=60)
        assert store.process.returncode == 0
