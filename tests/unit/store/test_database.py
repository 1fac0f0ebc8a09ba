import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import NullPool, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store import schema
from adaptermesh.store.database import Database, DatabaseConfig


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(DatabaseConfig(database_url, busy_seconds=0.2), lambda: None)
    await opened.open("first")
    yield opened
    await opened.close()


@asynccontextmanager
async def another(url: str) -> AsyncIterator[AsyncEngine]:
    """What another process may do."""
    engine = create_async_engine(url, poolclass=NullPool)
    yield engine
    await engine.dispose()


async def head(database: Database) -> int:
    async with database.reading() as connection:
        return int((await connection.execute(select(schema.feed.c.head_position))).scalar_one())


def advance(by: int) -> Any:
    return lambda connection: connection.execute(
        update(schema.feed).values(head_position=schema.feed.c.head_position + by)
    )


async def test_opening_again_changes_nothing_and_keeps_the_identity(
    database: Database, database_url: str
) -> None:
    await database.write(advance(7))
    again = Database(DatabaseConfig(database_url), lambda: None)
    await again.open("second")
    async with again.reading() as connection:
        row = (await connection.execute(select(schema.feed))).one()
    assert (row.feed_id, row.head_position) == ("first", 7)
    await again.close()


async def test_many_may_open_a_new_database_at_the_same_time(bare_database_url: str) -> None:
    databases = [Database(DatabaseConfig(bare_database_url), lambda: None) for _ in range(4)]
    await asyncio.gather(*(database.open(str(n)) for n, database in enumerate(databases)))
    async with databases[0].reading() as connection:
        assert len((await connection.execute(select(schema.feed))).all()) == 1
    for database in databases:
        await database.close()


async def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    async with database.reading() as connection:
        query = select(schema.feed.c.head_position)
        before = (await connection.execute(query)).scalar()
        await database.write(advance(1))
        assert (await connection.execute(query)).scalar() == before
    assert await head(database) == 1


async def test_a_write_that_fails_changes_nothing(database: Database) -> None:
    async def work(connection: Any) -> None:
        await advance(1)(connection)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await database.write(work)
    assert await head(database) == 0


async def test_a_write_that_has_begun_ends_even_if_its_caller_is_cancelled(database: Database) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work(connection: Any) -> None:
        begun.set()
        await go_on.wait()
        await advance(1)(connection)

    writing = asyncio.create_task(database.write(work))
    await begun.wait()
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    go_on.set()
    await database.write(advance(10))
    assert await head(database) == 11


async def test_a_write_that_waits_for_its_turn_is_given_up_when_cancelled(database: Database) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work(connection: Any) -> None:
        begun.set()
        await go_on.wait()

    first = asyncio.create_task(database.write(work))
    await begun.wait()
    second = asyncio.create_task(database.write(advance(1)))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    go_on.set()
    await first
    assert await head(database) == 0


async def test_a_turn_that_does_not_come_is_unavailable_and_worth_a_retry(database: Database) -> None:
    go_on = asyncio.Event()

    async def work(connection: Any) -> None:
        await go_on.wait()

    first = asyncio.create_task(database.write(work))
    with pytest.raises(MeshError) as caught:
        while True:
            await database.write(advance(1))
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_after
    go_on.set()
    await first


async def test_another_process_that_writes_too_long_makes_it_unavailable(
    database: Database, database_url: str
) -> None:
    async with another(database_url) as engine, engine.connect() as other:
        await advance(100)(other)
        with pytest.raises(MeshError) as caught:
            await database.write(advance(1))
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.OVERLOADED)
        await other.rollback()
    await database.write(advance(1))
    assert await head(database) == 1


async def test_readers_that_are_cancelled_at_any_point_leave_every_connection_usable(
    database_url: str,
) -> None:
    database = Database(DatabaseConfig(database_url, connections=2), lambda: None)
    await database.open("id")
    for pauses in range(40):
        reading = asyncio.create_task(head(database))
        for _ in range(pauses):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert await asyncio.gather(*(head(database) for _ in range(6))) == [0] * 6
    await database.close()
    gc.collect()
