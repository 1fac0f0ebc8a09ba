"""What only PostgreSQL does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import NullPool, event, exc, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store import postgres, schema
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.testing.polling import eventually
from tests.postgres import PASSWORD, running_postgres

ADVANCE = update(schema.feed).values(head_position=schema.feed.c.head_position + 1)
LOCK_ROUTES = text("LOCK TABLE routes IN EXCLUSIVE MODE")
WAITING = text(
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


@asynccontextmanager
async def opened(url: str, **config: Any) -> AsyncIterator[Database]:
    database = Database(DatabaseConfig(url, **config), lambda: None)
    try:
        await database.open("id")
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def another(url: str) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


async def head(database: Database) -> int:
    async with database.reading() as connection:
        return int((await connection.execute(select(schema.feed.c.head_position))).scalar_one())


async def advance(connection: AsyncConnection) -> None:
    await connection.execute(ADVANCE)


async def test_a_read_transaction_can_not_write(postgres_url: str) -> None:
    async with opened(postgres_url) as database, database.reading() as connection:
        assert await connection.get_isolation_level() == "REPEATABLE READ"
        with pytest.raises(exc.DBAPIError, match="read-only"):
            await connection.execute(ADVANCE)


async def test_a_deadlock_with_somebody_else_is_run_again_and_done_once(postgres_url: str) -> None:
    runs = 0

    async def work(connection: AsyncConnection) -> None:
        nonlocal runs
        runs += 1
        await connection.execute(ADVANCE)
        await connection.execute(LOCK_ROUTES)

    async with opened(postgres_url) as database, another(postgres_url) as other:
        # The store is to find the deadlock, and so to be the one that gives way.
        await other.execute(text("SET deadlock_timeout = '100s'"))
        await other.execute(LOCK_ROUTES)
        writing = asyncio.create_task(database.write(work))
        async with another(postgres_url) as watcher:
            await eventually(lambda: count(watcher, WAITING))
        await other.execute(ADVANCE)
        await other.commit()
        await writing
        assert runs > 1
        assert await head(database) == 2


async def count(connection: AsyncConnection, query: Any) -> int:
    found = int((await connection.execute(query)).scalar_one())
    await connection.rollback()
    return found


async def test_a_transaction_that_is_always_undone_is_given_up(postgres_url: str) -> None:
    runs = 0

    async def work(connection: AsyncConnection) -> None:
        nonlocal runs
        runs += 1
        await connection.execute(ADVANCE)
        await connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"))

    async with opened(postgres_url) as database:
        with pytest.raises(MeshError) as caught:
            await database.write(work)
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.OVERLOADED)
        assert caught.value.retry_after
        assert 1 < runs < 10
        assert await head(database) == 0


async def test_a_store_that_hangs_in_a_write_loses_its_turn(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def hang(connection: AsyncConnection) -> None:
        await connection.execute(ADVANCE)
        await go_on.wait()
        await connection.execute(ADVANCE)

    monkeypatch.setattr(postgres, "_IDLE_SECONDS", 0.3)
    async with opened(postgres_url) as hanging, opened(postgres_url) as database:
        writing = asyncio.create_task(hanging.write(hang))
        await eventually(lambda: locked(postgres_url))
        await database.write(advance)
        go_on.set()
        with pytest.raises(MeshError) as caught:
            await writing
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
        assert await head(database) == 1
        await hanging.write(advance)
        assert await head(hanging) == 2


async def locked(url: str) -> bool:
    async with another(url) as connection:
        free = select(schema.feed.c.id).with_for_update(skip_locked=True)
        return (await connection.execute(free)).first() is None


async def test_connections_that_the_server_closed_are_replaced_before_they_are_used(
    postgres_url: str, postgres_server: Any
) -> None:
    async with opened(postgres_url) as database:
        used: list[Any] = []
        event.listen(
            database._engine.sync_engine,
            "checkout",
            lambda connection, *_: used.append(connection.driver_connection),
        )
        await asyncio.gather(*(head(database) for _ in range(5)))
        postgres_server.sql(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'adaptermesh-store'"
        )

        async def all_closed() -> bool:
            return all(connection.is_closed() for connection in used)

        await eventually(all_closed)
        assert await asyncio.gather(*(head(database) for _ in range(5))) == [0] * 5
        await database.write(advance)


@pytest.mark.parametrize("wrong", [{"password": "hunter2"}, {"database": "nowhere"}, {"port": 1}])
async def test_a_database_that_can_not_be_reached_is_named_without_its_password(
    postgres_url: str, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(postgres_url).set(**wrong).render_as_string(hide_password=False)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MeshError) as caught:
        async with opened(url, busy_seconds=0.2):
            pass
    error = caught.value
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
    assert "database lost" in caplog.text
    for text_shown in (caplog.text, str(error), repr(error), *(str(r.__dict__) for r in caplog.records)):
        assert "hunter2" not in text_shown
        assert PASSWORD not in text_shown


async def test_a_schema_that_changes_under_a_running_store_costs_no_write(postgres_url: str) -> None:
    async with opened(postgres_url) as database:
        query = select(schema.feed)

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(query)

        await database.write(work)
        async with another(postgres_url) as other:
            await other.execute(text("ALTER TABLE feed ALTER COLUMN feed_id TYPE VARCHAR(40)"))
            await other.commit()
        await database.write(work)


async def test_a_server_that_does_not_answer_holds_nobody_longer_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres, "_STATEMENT_SECONDS", 0.2)
    monkeypatch.setattr(postgres, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(postgres, "_CONNECT_SECONDS", 0.5)
    with running_postgres(durable=False) as server:
        async with opened(server.url("postgres"), connections=4, busy_seconds=0.2) as database:
            for _ in range(2):
                in_work, go_on = asyncio.Event(), asyncio.Event()
                writing = asyncio.create_task(database.write(waits(in_work, go_on)))
                await in_work.wait()
                async with asyncio.timeout(60):
                    with server.frozen():
                        go_on.set()
                        calls = [writing, *(head(database) for _ in range(6))]
                        outcomes = await asyncio.gather(*calls, return_exceptions=True)
                    for outcome in outcomes:
                        assert isinstance(outcome, MeshError), outcome
                        assert outcome.code is Code.UNAVAILABLE
                    await eventually(lambda: answers(database))
                    await database.write(advance)


def waits(begun: asyncio.Event, go_on: asyncio.Event) -> Callable[[AsyncConnection], Awaitable[None]]:
    async def work(connection: AsyncConnection) -> None:
        begun.set()
        await go_on.wait()
        await connection.execute(ADVANCE)

    return work


async def answers(database: Database) -> bool:
    try:
        await database.write(advance)
    except MeshError:
        return False
    return True


async def test_an_outage_is_two_lines_in_the_log(
    postgres_url: str, postgres_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptermesh.store.database")
    async with opened(postgres_url) as database:
        name = make_url(postgres_url).database
        postgres_server.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        kick = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        postgres_server.sql(kick)

        async def refused() -> bool:
            return not await answers(database)

        await eventually(refused)
        for _ in range(5):
            assert await refused()
        postgres_server.sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await eventually(lambda: answers(database))
        await database.write(advance)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if message.startswith("database")] == [
        "database lost",
        "database is back",
    ]
