"""The catalogue in a SQLite file: for one process, or a few on one machine."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import PoolResetState

from adaptermesh.store.dialect import Access, Trouble
from adaptermesh.store.sqlite_connections import SqliteConnections

_WRITES = "adaptermesh_writes"
_PRAGMA_SECONDS = 10.0
_PRAGMA_PAUSE = 0.01


class Sqlite:
    """A `Dialect`. Other processes' commits are found by reading, nobody tells of them."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        self._path = url.database
        self._connections = SqliteConnections()
        self.access = Access(
            # The driver shall begin nothing by itself: see `_begin`.
            connect_args={
                "isolation_level": None,
                "timeout": busy_seconds,
                "async_creator_fn": self._connections.make,
            },
            # See `_reset`.
            engine={"pool_reset_on_return": None},
            # Tells the `begin` listener to take the write lock at once.
            writing={_WRITES: True},
        )

    async def make_room(self) -> None:
        """Makes the file's folder."""
        if self._path:
            await asyncio.to_thread(Path(self._path).parent.mkdir, parents=True, exist_ok=True)

    def prepare(self, engine: AsyncEngine) -> None:
        """Sets the pragmas of each connection, and how a transaction begins."""
        event.listen(engine.sync_engine, "connect", _prepare)
        event.listen(engine.sync_engine, "begin", _begin)
        event.listen(engine.sync_engine, "reset", _reset)

    async def close(self) -> None:
        """Waits for the connections' threads."""
        await self._connections.ended()

    async def lock_schema(self, connection: AsyncConnection) -> None:
        """Nothing: the transaction began with the write lock."""

    async def take_turn(self, connection: AsyncConnection) -> None:
        """Nothing, likewise."""

    async def announce(self, connection: AsyncConnection) -> None:
        """Nothing: nobody listens."""

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Returns at once."""

    async def fetch(self, driver: Any, sql: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """In one step of the connection's thread."""
        try:
            rows: Sequence[Sequence[Any]] = await driver.execute_fetchall(sql, values)
        except sqlite3.Error as error:
            raise exc.OperationalError(sql, None, error) from error
        return rows

    def trouble(self, error: Exception) -> Trouble | None:
        """BUSY if another process had the file for too long."""
        if isinstance(error, exc.OperationalError):
            name: str = getattr(error.orig, "sqlite_errorname", "")
            return Trouble.BUSY if name.startswith("SQLITE_BUSY") else None
        return None


def _prepare(connection: Any, _record: object) -> None:
    connection.run_async(_set_pragmas)


async def _set_pragmas(connection: Any) -> None:
    # WAL lets readers go on during a write; FULL makes a commit survive a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        async with asyncio.timeout(_PRAGMA_SECONDS):
            while not await _set_pragma(connection, pragma):  # noqa: ASYNC110 (no event tells of another process)
                await asyncio.sleep(_PRAGMA_PAUSE)


async def _set_pragma(connection: Any, pragma: str) -> bool:
    """False if another connection holds the file.

    SQLite does not wait for that itself where waiting could last for ever: when several open a new file at
    once, of which each wants to make one of WAL.
    """
    try:
        async with connection.execute(f"PRAGMA {pragma}"):
            return True
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return False


def _begin(connection: Connection) -> None:
    # IMMEDIATE, because a transaction that reads first and writes later can't be made to wait for its turn.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _reset(connection: Any, _record: object, state: PoolResetState) -> None:
    """Undoes a transaction that was left open. To ask for that in any case would take the thread's time."""
    if state.asyncio_safe and connection.driver_connection.in_transaction:
        connection.rollback()
