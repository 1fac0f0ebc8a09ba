from collections.abc import AsyncIterator

import pytest
from sqlalchemy import bindparam, column, exc, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store import schema
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.testing.polling import eventually

ROUTES = select(schema.routes.c.task, schema.routes.c.targets, schema.routes.c.deleted)
ROUTE = {"tenant": "*", "targets": [{"ref": "base"}], "generation": 1, "update_time_us": 0, "deleted": False}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(DatabaseConfig(database_url, connections=4), lambda: None)
    await opened.open("id")
    yield opened
    await opened.close()


async def add(database: Database, task: str) -> None:
    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(schema.routes).values(task=task, **ROUTE))

    await database.write(work)


async def test_rows_have_the_names_and_types_of_the_query(database: Database) -> None:
    await add(database, "ner")
    (row,) = await database.fetch(database.prepare(ROUTES))
    assert (row.task, row.targets, row.deleted) == ("ner", [{"ref": "base"}], False)
    assert row.deleted is False


async def test_values_are_taken_by_name_wherever_they_are_in_the_query(database: Database) -> None:
    for name in ("ner", "sql"):
        await add(database, name)
    tenant, task = schema.routes.c.tenant, schema.routes.c.task
    conditions = (task == bindparam("wanted"), tenant == "*", task != bindparam("other"))
    query = database.prepare(ROUTES.where(*conditions))
    assert [row.task for row in await database.fetch(query, wanted="sql", other="ner")] == ["sql"]
    assert await database.fetch(query, wanted="sql", other="sql") == []


async def test_a_value_is_never_read_as_sql(database: Database) -> None:
    await add(database, "ner")
    query = database.prepare(ROUTES.where(schema.routes.c.task == bindparam("task")))
    assert await database.fetch(query, task="' OR '1'='1") == []


async def test_what_is_committed_is_found_at_once_and_nothing_else(database: Database) -> None:
    query = database.prepare(ROUTES)

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(schema.routes).values(task="ner", **ROUTE))
        assert await database.fetch(query) == []

    await database.write(work)
    assert len(await database.fetch(query)) == 1


async def test_a_failed_query_leaves_a_connection_that_works(database: Database) -> None:
    query = database.prepare(select(column("nothing")))
    for _ in range(8):
        with pytest.raises(exc.DBAPIError, match="nothing"):
            await database.fetch(query)
    assert await database.fetch(database.prepare(ROUTES)) == []


async def test_a_transaction_that_was_left_open_is_undone(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        await database.write(_adds_and_fails)
    assert await database.fetch(database.prepare(ROUTES)) == []
    await add(database, "ner")


async def _adds_and_fails(connection: AsyncConnection) -> None:
    await connection.execute(insert(schema.routes).values(task="ner", **ROUTE))
    raise ZeroDivisionError


async def test_a_server_that_ended_the_connections_is_found_again(postgres_url: str) -> None:
    database = Database(DatabaseConfig(postgres_url), lambda: None)
    await database.open("id")
    query = database.prepare(ROUTES)
    await database.fetch(query)

    async def end_all(connection: AsyncConnection) -> None:
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        await connection.execute(
            text(ended + "WHERE datname = current_database() AND pid <> pg_backend_pid()")
        )

    async with database.reading() as holder:
        await end_all(holder)

    async def answers() -> bool:
        try:
            return await database.fetch(query) == []
        except MeshError as error:
            assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
            return False

    await eventually(answers)
    await database.close()
