"""Connections to a SQLite file, each with its thread: one that is given up twice still comes to an end."""

import asyncio
import sqlite3
from typing import Any
from weakref import WeakSet

import aiosqlite

_ROWS_AT_ONCE = 64
_STATEMENT_SECONDS = 5.0


class SqliteConnection(aiosqlite.Connection):
    """The driver's connection, which can be stopped any number of times.

    SQLAlchemy closes a connection whose statement is cancelled, and stops it when that is cancelled too. The
    driver's thread answers the first stop only: who closes would wait for the second one for ever, and so
    would the event loop that is to end.
    """

    _stopped: asyncio.Future[Any] | None = None

    @property
    def stopped(self) -> bool:
        """Whether its thread ends, once it has done what it was told before."""
        return self._stopped is not None

    def stop(self) -> asyncio.Future[Any] | None:
        if self._stopped is None:
            self._stopped = super().stop()
        return self._stopped


class SqliteConnections:
    """Makes connections, and knows when none of their threads runs any more."""

    def __init__(self) -> None:
        self._made: WeakSet[SqliteConnection] = WeakSet()

    def make(self, database: str, **options: Any) -> SqliteConnection:
        """A connection that is opened when it is awaited; the options are those of `sqlite3.connect`."""
        connection = SqliteConnection(lambda: sqlite3.connect(database, **options), _ROWS_AT_ONCE)
        # A process that ends does not wait for a statement.
        connection._thread.daemon = True  # SQLAlchemy does the same to connections that it makes
        self._made.add(connection)
        return connection

    async def ended(self) -> None:
        """Waits for what still runs on connections that were stopped: it would answer a loop that is gone."""
        for connection in list(self._made):
            if connection.stopped:
                thread = connection._thread  # as above
                await asyncio.to_thread(thread.join, _STATEMENT_SECONDS)
