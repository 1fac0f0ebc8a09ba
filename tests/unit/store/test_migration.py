"""Every released schema, with data, on both databases."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.core.refs import parse_ref
from adaptermesh.store import migration, schema
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.migration import migrate
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.search_query import SearchQuery
from adaptermesh.store.stores import StoreConfig, Stores

SCRIPTS = Path(migration.__file__).parent / "migrations"
DIGEST = "sha256:" + "0" * 64
RELEASED = Path(__file__).parent / "released"


@asynccontextmanager
async def transaction(url: str) -> AsyncIterator[Callable[[Callable[..., Any]], Any]]:
    """Runs functions of a plain connection."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            # The driver would begin only before the first change of data.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection.run_sync
        await connection.commit()
    await engine.dispose()


def alembic_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection
    return config


def revisions() -> list[str]:
    return [script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions()]


def differences(connection: Connection) -> list[Any]:
    # The index of words is of a kind that only the database's own language describes.
    options = {"include_name": lambda name, kind, _: kind != "table" or not name.startswith("search_words")}
    context = MigrationContext.configure(connection, opts=options)
    found: list[Any] = compare_metadata(context, schema.metadata)
    return found


@pytest.fixture
def url(bare_database_url: str) -> str:
    if bare_database_url.startswith("sqlite"):
        Path(bare_database_url.removeprefix("sqlite+aiosqlite:///")).parent.mkdir()
    return bare_database_url


def rows(revision: str, url: str) -> list[str]:
    """One statement each; those that only one kind of database understands come last."""
    dialect = url.partition("+")[0]
    files = [RELEASED / f"{revision}.sql", RELEASED / f"{revision}-{dialect}.sql"]
    lines = [
        line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert lines
    return [line for line in lines if not line.startswith("--")]


async def test_what_migrations_make_is_the_schema_of_the_code(url: str) -> None:
    async with transaction(url) as run:
        await run(lambda connection: migrate(connection, "id"))
        assert await run(differences) == []


@pytest.mark.parametrize("revision", revisions())
async def test_a_database_of_every_revision_is_upgraded_with_what_is_in_it(
    url: str, revision: str, tmp_path: Path
) -> None:
    async with transaction(url) as run:
        await run(lambda connection: command.upgrade(alembic_config(connection), revision))
        for row in rows(revision, url):
            await run(lambda connection, row=row: connection.exec_driver_sql(row))
    stores = Stores(StoreConfig(tmp_path / "bytes", DatabaseConfig(url)), SystemClock())
    await stores.open()
    async with stores.database.reading() as connection:
        assert await connection.run_sync(differences) == []
    items = [item async for item in stores.snapshots.read()]
    assert {(item.feed_id, item.feed_position) for item in items} == {("the-feed", 4)}
    # The grant is newer than the rest.
    assert len(items) == 5 + (revision >= "r0004")
    version, aliases = await stores.catalogue.resolve(parse_ref("acme/ner@prod"))
    assert (version.record.digest, version.record.source_files[0].path, aliases) == (
        DIGEST,
        "a.json",
        ("prod",),
    )
    watch = stores.feed.watch(stores.database, "the-feed", 0)
    changes = [(await anext(watch)).change for _ in range(4)]
    assert [change.position for change in changes if change] == [1, 2, 3, 4]
    await watch.aclose()
    await stores.close()


async def test_what_an_older_store_published_is_found_by_its_words(url: str, tmp_path: Path) -> None:
    async with transaction(url) as run:
        await run(lambda connection: command.upgrade(alembic_config(connection), "r0001"))
        for row in rows("r0001", url):
            await run(lambda connection, row=row: connection.exec_driver_sql(row))
    stores = Stores(StoreConfig(tmp_path / "bytes", DatabaseConfig(url)), SystemClock())
    await stores.open()
    for words in ("", "ner", "name", "acme a", "other"):
        page = await stores.search.find(SearchQuery(words, task="ner", tags=("a",)), PageRequest())
        assert [item.newest.digest for item in page.items] == [DIGEST] * (words != "other"), words
    await stores.close()


async def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        async with transaction(url) as run:
            await run(lambda connection: migrate(connection, "lost"))
            raise RuntimeError("in the middle")
    async with transaction(url) as run:
        assert await run(lambda connection: inspect(connection).get_table_names()) == []


async def test_a_database_of_a_newer_store_is_left_alone(url: str) -> None:
    async with transaction(url) as run:
        await run(lambda connection: migrate(connection, "id"))
        newer = text("UPDATE alembic_version SET version_num = 'r9999'")
        await run(lambda connection: connection.execute(newer))
    database = Database(DatabaseConfig(url), lambda: None)
    with pytest.raises(MeshError, match="r9999, of a newer store") as caught:
        await database.open("id")
    assert caught.value.code is Code.FAILED_PRECONDITION
    await database.close()


async def test_every_revision_can_be_taken_back(url: str) -> None:
    async with transaction(url) as run:
        await run(lambda connection: migrate(connection, "id"))
        await run(lambda connection: command.downgrade(alembic_config(connection), "base"))
        assert await run(lambda connection: inspect(connection).get_table_names()) == ["alembic_version"]
