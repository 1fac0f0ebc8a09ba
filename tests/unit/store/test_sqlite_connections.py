"""Statements that are given up, once or twice, while the connection's thread is at work."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.sqlite_connections import SqliteConnections


async def test_a_connection_that_is_stopped_while_it_closes_is_closed() -> None:
    connections, held = SqliteConnections(), threading.Event()
    connection = await connections.make(":memory:")
    busy = asyncio.create_task(connection._execute(held.wait))  # any statement that takes long
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    connection.stop()
    held.set()
    async with asyncio.timeout(20):
        await asyncio.gather(busy, closing)
        await connections.ended()


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_a_read_that_is_given_up_leaves_nothing_behind(tmp_path: Path, cancellations: int) -> None:
    database = Database(DatabaseConfig(f"sqlite+aiosqlite:///{tmp_path}/catalogue.db"), lambda: None)
    await database.open("id")
    before = asyncio.all_tasks()
    held, begun = threading.Event(), threading.Event()

    def hold() -> int:
        begun.set()
        return int(held.wait(20))

    async def add_function(driver: Any) -> None:
        await driver.create_function("hold", 0, hold)

    async def prepare(connection: AsyncConnection) -> None:
        raw = await connection.get_raw_connection()
        await add_function(raw.driver_connection)

    async def read() -> None:
        async with database.reading() as connection:
            await prepare(connection)
            await connection.execute(text("SELECT hold()"))

    reading = asyncio.create_task(read())
    await asyncio.to_thread(begun.wait, 20)
    for _ in range(cancellations):
        reading.cancel()
        for _ in range(20):
            # Far enough to wait for the connection to close.
            await asyncio.sleep(0)
    held.set()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await reading
        await database.close()
        while asyncio.all_tasks() - before:
            await asyncio.wait(asyncio.all_tasks() - before)
