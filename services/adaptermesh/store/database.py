"""The SQL database: connections, read and write transactions."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, event, exc
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from adaptermesh.core.errors import MeshError, Reason, unavailable
from adaptermesh.store.migration import migrate
from adaptermesh.store.ownership import OwnedWork

T = TypeVar("T")

_WRITES = "adaptermesh_writes"
_PRAGMA_SECONDS = 10.0
_PRAGMA_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """Where the catalogue is and how it is reached."""

    url: str
    """SQLAlchemy's URL, `sqlite+aiosqlite:///<path>`."""
    connections: int = 8
    """How many transactions run at the same time."""
    busy_seconds: float = 10.0
    """How long a transaction waits for another process's write, or for a free connection."""


class Database:
    """Transactions over one database. Writers go one by one; a reader sees one state and waits for nobody."""

    def __init__(self, config: DatabaseConfig, on_commit: Callable[[], None]) -> None:
        """Connects on first use.

        Args:
            config: where the database is.
            on_commit: called on the event loop after each write.
        """
        self._url = make_url(config.url)
        self._reader = _open_engine(config)
        # The same pool; the option tells the `begin` listener to take the write lock at once.
        self._writer = self._reader.execution_options(**{_WRITES: True})
        self._busy_seconds = config.busy_seconds
        self._turn = asyncio.Lock()
        self._on_commit = on_commit
        self._work = OwnedWork()

    @property
    def dialect(self) -> str:
        """SQLAlchemy's name of the kind of database."""
        return self._url.get_backend_name()

    async def open(self, new_feed_id: str) -> None:
        """Makes the database if there is none and brings its schema up to date."""
        if self._url.database:
            await asyncio.to_thread(Path(self._url.database).parent.mkdir, parents=True, exist_ok=True)
        async with self._writer.begin() as connection:
            await connection.run_sync(migrate, new_feed_id)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A read transaction: everything in it sees the same state."""
        with _busy_is_unavailable():
            async with self._reader.connect() as connection:
                yield connection

    async def write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Runs `work` in a write transaction and commits it.

        A caller that is cancelled meanwhile doesn't interrupt it: a mutation that has begun runs to its end.

        Raises:
            MeshError: UNAVAILABLE if its turn doesn't come in time; else what `work` raises.
        """
        with _busy_is_unavailable():
            async with asyncio.timeout(self._busy_seconds):
                await self._turn.acquire()
        return await self._work.finish(self._write(work))

    async def close(self) -> None:
        """Waits for the writes that have begun and closes the connections."""
        await self._work.wait()
        await self._reader.dispose()

    async def _write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            with _busy_is_unavailable():
                async with self._writer.begin() as connection:
                    result = await work(connection)
        finally:
            self._turn.release()
        self._on_commit()
        return result


@contextmanager
def _busy_is_unavailable() -> Iterator[None]:
    """A wait for a connection or for another writer that took too long is worth a retry."""
    try:
        yield
    except (TimeoutError, exc.TimeoutError) as error:
        raise _busy() from error
    except exc.OperationalError as error:
        if getattr(error.orig, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            raise _busy() from error
        raise


def _busy() -> MeshError:
    return unavailable(Reason.OVERLOADED, "the store's database is busy", retry_after=1.0)


def _open_engine(config: DatabaseConfig) -> AsyncEngine:
    engine = create_async_engine(
        config.url,
        pool_size=config.connections,
        max_overflow=0,
        pool_timeout=config.busy_seconds,
        # The driver shall begin nothing by itself: see `_begin`.
        connect_args={"isolation_level": None, "timeout": config.busy_seconds},
    )
    event.listen(engine.sync_engine, "connect", _prepare)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


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
