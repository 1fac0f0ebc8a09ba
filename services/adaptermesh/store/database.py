"""The SQL database: connections, read and write transactions."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Select, exc
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.util import greenlet_spawn

from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.store.dialect import Dialect, Trouble
from adaptermesh.store.migration import migrate
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.postgres import Postgres
from adaptermesh.store.prepared import Prepared
from adaptermesh.store.sqlite import Sqlite

log = logging.getLogger(__name__)

T = TypeVar("T")

_DIALECTS: dict[str, Callable[..., Dialect]] = {"sqlite": Sqlite, "postgresql": Postgres}
_RUNS = 4
_RUN_PAUSE_SECONDS = 0.05
_CLOSE_SECONDS = 5.0
_OPEN_PAUSE_SECONDS = 0.5
_MESSAGES = {
    Trouble.BUSY: (Reason.OVERLOADED, "the store's database is busy"),
    Trouble.RERUN: (Reason.OVERLOADED, "the store's database is busy: others changed the same at once"),
    Trouble.LOST: (Reason.STORE_UNREACHABLE, "the store can't reach its database"),
}


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """Where the catalogue is and how it is reached."""

    # Not shown: there may be a password in it.
    url: str = field(repr=False)
    """SQLAlchemy's URL, `sqlite+aiosqlite:///<path>` or `postgresql+asyncpg://user:password@host:port/name`."""
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
            on_commit: called on the event loop after each write; if the database tells of them, also after
                those of other processes.
        """
        url = make_url(config.url)
        self._dialect = _DIALECTS[url.get_backend_name()](url, config.busy_seconds)
        access = self._dialect.access
        self._engine = create_async_engine(
            url,
            pool_size=config.connections,
            max_overflow=0,
            # Values are none of a log's business.
            hide_parameters=True,
            # The connection that was used last knows the statements.
            pool_use_lifo=True,
            pool_timeout=config.busy_seconds,
            connect_args=dict(access.connect_args),
            **access.engine,
        )
        self._dialect.prepare(self._engine)
        # Both have the same pool.
        self._reader = self._engine.execution_options(**access.reading)
        self._writer = self._engine.execution_options(**access.writing)
        self._busy_seconds = config.busy_seconds
        self._turn = asyncio.Lock()
        # Whether the last one who asked was told so: an outage is two lines in the log.
        self._lost = False
        self._on_commit = on_commit
        self._work = OwnedWork()
        self._following: asyncio.Task[None] | None = None

    @property
    def dialect(self) -> str:
        """SQLAlchemy's name of the kind of database."""
        return self._engine.dialect.name

    async def open(self, new_feed_id: str) -> None:
        """Makes the tables if there are none and brings the schema up to date.

        Raises:
            MeshError: UNAVAILABLE if the database can't be reached, after some attempts;
                FAILED_PRECONDITION if it refuses the tables, or has those of a newer store.
        """
        await self._dialect.make_room()
        deadline = asyncio.get_running_loop().time() + self._busy_seconds
        while not await self._migrated(new_feed_id, deadline):  # noqa: ASYNC110 (no event tells of a server)
            await asyncio.sleep(_OPEN_PAUSE_SECONDS)
        self._following = asyncio.create_task(self._follow())

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A read transaction: everything in it sees the same state."""
        with self._trouble_is_unavailable():
            async with self._reader.connect() as connection:
                yield connection

    def prepare(self, query: Select[Any]) -> Prepared:
        """A query for `fetch`."""
        return Prepared(query, self._engine.dialect)

    async def fetch(self, query: Prepared, **values: Any) -> list[Any]:
        """The rows of one query, which sees one state without a transaction around it: far faster."""
        with self._trouble_is_unavailable():
            connection = await self._engine.raw_connection()
            try:
                driver = connection.driver_connection
                rows = await self._dialect.fetch(driver, query.sql, query.values(values))
            finally:
                await greenlet_spawn(connection.close)
        return query.rows(rows)

    async def write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Runs `work` in a write transaction and commits it.

        A caller that is cancelled meanwhile doesn't interrupt it: a mutation that has begun runs to its end.

        Args:
            work: does everything over the connection; it may be run again, after all that it did was undone.

        Raises:
            MeshError: UNAVAILABLE if its turn doesn't come in time, or the database is lost, in which case
                the mutation may have been committed; else what `work` raises.
        """
        try:
            async with asyncio.timeout(self._busy_seconds):
                await self._turn.acquire()
        except TimeoutError as error:
            raise _unavailable(Trouble.BUSY) from error
        return await self._work.finish(self._write(work))

    async def close(self) -> None:
        """Waits for the writes that have begun and closes the connections."""
        await self._work.wait()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following], timeout=_CLOSE_SECONDS)
        with suppress(TimeoutError):
            # A server that doesn't answer is not waited for.
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._engine.dispose()
                await self._dialect.close()

    async def _migrated(self, new_feed_id: str, deadline: float) -> bool:
        """False if the database can't be reached yet, and it isn't too late to try again."""
        try:
            with self._trouble_is_unavailable():
                async with self._writer.begin() as connection:
                    await self._dialect.lock_schema(connection)
                    await connection.run_sync(migrate, new_feed_id)
        except MeshError as error:
            if error.reason is Reason.STORE_UNREACHABLE and asyncio.get_running_loop().time() < deadline:
                return False
            raise
        except exc.DBAPIError as error:
            message = f"the store can't make its tables: {_words(error)}"
            raise MeshError(Code.FAILED_PRECONDITION, Reason.INTERNAL, message) from error
        return True

    async def _follow(self) -> None:
        try:
            await self._dialect.follow(self._on_commit)
        except Exception:
            # Watchers find the changes of others late from here on, but they find them.
            log.exception("other stores are not heard any more")

    async def _write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            with self._trouble_is_unavailable():
                result = await self._run(work)
        finally:
            self._turn.release()
        self._on_commit()
        return result

    async def _run(self, work: Callable[[AsyncConnection], Awaitable[T]], runs: int = _RUNS) -> T:
        """Runs a transaction, and again if the database undid it for the sake of another one."""
        try:
            async with self._writer.begin() as connection:
                await self._dialect.take_turn(connection)
                result = await work(connection)
                await self._dialect.announce(connection)
        except exc.DBAPIError as error:
            if runs == 1 or self._dialect.trouble(error) is not Trouble.RERUN:
                raise
            log.info("transaction runs again", extra={"runs_left": runs - 1})
            # The other one is to have what it waited for.
            await asyncio.sleep(_RUN_PAUSE_SECONDS)
            return await self._run(work, runs - 1)
        return result

    @contextmanager
    def _trouble_is_unavailable(self) -> Iterator[None]:
        """What passes is worth a retry."""
        try:
            yield
        except (TimeoutError, exc.TimeoutError) as error:
            raise _unavailable(Trouble.BUSY) from error
        except (exc.DBAPIError, OSError) as error:
            trouble = self._dialect.trouble(error)
            if trouble is None:
                raise
            if trouble is Trouble.LOST and not self._lost:
                self._lost = True
                log.warning("database lost", extra={"reason": _words(error)})
            raise _unavailable(trouble) from error
        if self._lost:
            self._lost = False
            log.info("database is back")


def _words(error: Exception) -> str:
    """The driver's words, without the statement and its values."""
    return str(error.orig if isinstance(error, exc.DBAPIError) else error)[:200]


def _unavailable(trouble: Trouble) -> MeshError:
    reason, message = _MESSAGES[trouble]
    return unavailable(reason, message, retry_after=1.0)
