import asyncio
import gc
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, Table, create_engine, inspect, select, text, update

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.store import schema
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.migration import migrate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "catalogue.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    opened = Database(DatabaseConfig(f"sqlite+aiosqlite:///{path}", busy_seconds=0.2), lambda: None)
    await opened.open("first")
    yield opened
    await opened.close()


async def head(database: Database) -> int:
    async with database.reading() as connection:
        return int((await connection.execute(select(schema.feed.c.head_position))).scalar_one())


def advance(by: int) -> Any:
    return lambda connection: connection.execute(
        update(schema.feed).values(head_position=schema.feed.c.head_position + by)
    )


def differences(connection: Connection) -> list[Any]:
    # The index of words is of a kind that only the database's own language describes.
    options = {"include_name": lambda name, kind, _: kind != "table" or not name.startswith("search_words")}
    context = MigrationContext.configure(connection, opts=options)
    found: list[Any] = compare_metadata(context, schema.metadata)
    return found


async def test_the_migrated_database_has_the_schema_of_the_code(database: Database) -> None:
    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []


async def test_opening_again_changes_nothing_and_keeps_the_identity(database: Database, path: Path) -> None:
    await database.write(advance(7))
    again = Database(DatabaseConfig(f"sqlite+aiosqlite:///{path}"), lambda: None)
    await again.open("second")
    async with again.reading() as connection:
        row = (await connection.execute(select(schema.feed))).one()
    assert (row.feed_id, row.head_position) == ("first", 7)
    await again.close()


async def test_a_migration_that_fails_leaves_nothing_behind(path: Path) -> None:
    path.parent.mkdir()
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        migrate(connection, "lost")
        connection.exec_driver_sql("ROLLBACK")
        assert inspect(connection).get_table_names() == []
    engine.dispose()


def row_of(table: Table, **given: Any) -> dict[str, Any]:
    """A row whose other columns, as far as they must be there, are of the right type."""
    plain: dict[type, Any] = {int: 0, bool: False, str: "x", object: []}
    needed = {column.name: plain[column.type.python_type] for column in table.c if not column.nullable}
    return needed | given


def test_what_an_older_store_published_is_found_after_the_migration(path: Path) -> None:
    path.parent.mkdir()
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        migrate(connection, "old", "r0001")
        tables = MetaData()
        tables.reflect(connection)
        insert = {name: tables.tables[name].insert() for name in ("base_models", "adapters", "versions")}
        base = row_of(tables.tables["base_models"], digest="sha256:base", model_id="tiny")
        connection.execute(insert["base_models"], base)
        for key, name in ((1, "ner"), (2, "style")):
            adapter = row_of(tables.tables["adapters"], id=key, namespace="acme", name=name, version_count=2)
            connection.execute(insert["adapters"], adapter)
            for number in (1, 2):
                version = row_of(
                    tables.tables["versions"],
                    id=10 * key + number,
                    adapter_id=key,
                    number=number,
                    digest=f"{name}{number}",
                    base_digest="sha256:base",
                    description=f"Caf\u00e9s of {name} number{number}",
                    tags=["finance"],
                    feed_position=10 * key + number,
                )
                connection.execute(insert["versions"], version)
        migrate(connection, "lost")
        found = text("SELECT rowid FROM search_words WHERE search_words MATCH :words ORDER BY rowid")
        cases: tuple[tuple[str, list[int]], ...] = (
            ("acme", [1, 2]),
            ("finance ner", [1]),
            ("cafes number2", [1, 2]),
            ("number1", []),
        )
        for words, expected in cases:
            assert connection.execute(found, {"words": words}).scalars().all() == expected
        documents = select(schema.search_documents).order_by(schema.search_documents.c.adapter_id)
        newest = [(row.version_id, row.feed_position) for row in connection.execute(documents)]
        assert newest == [(12, 12), (22, 22)]
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()


async def test_many_may_open_a_new_database_at_the_same_time(path: Path) -> None:
    config = DatabaseConfig(f"sqlite+aiosqlite:///{path}")
    databases = [Database(config, lambda: None) for _ in range(4)]
    await asyncio.gather(*(database.open(str(n)) for n, database in enumerate(databases)))
    async with databases[0].reading() as connection:
        assert len((await connection.execute(select(schema.feed))).all()) == 1
    for database in databases:
        await database.close()


async def test_commits_survive_and_readers_never_wait(database: Database) -> None:
    async with database.reading() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert (await connection.execute(text(f"PRAGMA {pragma}"))).scalar() == value


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
    database: Database, path: Path
) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(MeshError) as caught:
        await database.write(advance(1))
    assert caught.value.code is Code.UNAVAILABLE
    other.execute("ROLLBACK")
    other.close()
    await database.write(advance(1))
    assert await head(database) == 1


async def test_readers_that_are_cancelled_at_any_point_leave_every_connection_usable(path: Path) -> None:
    database = Database(DatabaseConfig(f"sqlite+aiosqlite:///{path}", connections=2), lambda: None)
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
