"""The catalogue in PostgreSQL: for several stores, on any machines."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
from sqlalchemy import URL, event, exc, func, select, text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from adaptermesh.store.dialect import Access, Trouble
from adaptermesh.store.notifications import Listener
from adaptermesh.store.schema import feed

CHANNEL = "adaptermesh_feed"
# Of all advisory locks of the database this one is ours: "mesh" in ASCII.
_SCHEMA_LOCK = 0x6D657368
_CONNECT_SECONDS = 5.0
_STATEMENT_SECONDS = 30.0
_IDLE_SECONDS = 10.0
# The server answers for its own limit, which is the lower one, unless it can't be heard.
_ANSWER_SECONDS = 5.0

_BUSY = {
    "55P03",  # lock_not_available
    "57014",  # query_canceled, by statement_timeout
}
_LOST = {
    "25006",  # read_only_sql_transaction: what answers is a standby now
    "25P03",  # idle_in_transaction_session_timeout
    "3D000",  # invalid_catalog_name: the database isn't there (yet)
    "55000",  # object_not_in_prerequisite_state: the database takes no connections
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P04",  # database_dropped
}
_RERUN = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
}
_BUSY_CLASSES = ("53",)  # insufficient resources: connections, memory, disk
_LOST_CLASSES = ("08", "28")  # connection exceptions; the login is refused


class Postgres:
    """A `Dialect`. Writers of all processes go one by one: each has the feed's row while it writes."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        self._url = url
        self._own = secrets.token_hex(8)
        self.access = Access(
            connect_args=_connect_args(busy_seconds),
            # One state for the whole transaction, from its first statement on.
            reading={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
            # Each statement sees what was committed before it: after the turn was taken, everything.
            writing={"isolation_level": "READ COMMITTED"},
        )

    async def make_room(self) -> None:
        """Nothing: the database is made by whoever runs the server."""

    def prepare(self, engine: AsyncEngine) -> None:
        """Replaces connections that the server has closed before they are used."""
        event.listen(engine.sync_engine, "checkout", _check_alive)

    async def close(self) -> None:
        """Nothing: a connection has no thread."""

    async def lock_schema(self, connection: AsyncConnection) -> None:
        """Waits for the migration of another process."""
        await connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))

    async def take_turn(self, connection: AsyncConnection) -> None:
        """Locks the feed's row, as every writer does first; so there are no deadlocks between them."""
        # A process that hangs, or whose machine has gone, must not keep the row.
        limit = f"SET LOCAL idle_in_transaction_session_timeout = {_milliseconds(_IDLE_SECONDS)}"
        await connection.execute(text(limit))
        await connection.execute(select(feed.c.id).with_for_update())

    async def announce(self, connection: AsyncConnection) -> None:
        """Sends a notification that the server delivers if and when the transaction is committed."""
        await connection.execute(select(func.pg_notify(CHANNEL, self._own)))

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Listens until it is cancelled."""
        await Listener(self._url, self.access.connect_args, CHANNEL, self._own).run(on_change)

    async def fetch(self, driver: Any, sql: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """In one round trip, once the driver has prepared the statement."""
        try:
            rows: Sequence[Sequence[Any]] = await driver.fetch(sql, *values)
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise exc.DBAPIError(sql, None, error, connection_invalidated=driver.is_closed()) from error
        return rows

    def trouble(self, error: Exception) -> Trouble | None:
        """By the server's code; without one, it never answered."""
        if isinstance(error, OSError):
            return Trouble.LOST
        if not isinstance(error, exc.DBAPIError):
            return None
        code: str = getattr(error.orig, "sqlstate", None) or ""
        if code in _RERUN or isinstance(error.orig, AsyncAdapt_asyncpg_dbapi.InvalidCachedStatementError):
            return Trouble.RERUN
        if code in _BUSY or code.startswith(_BUSY_CLASSES):
            return Trouble.BUSY
        if code in _LOST or code.startswith(_LOST_CLASSES) or error.connection_invalidated:
            return Trouble.LOST
        return None


def _connect_args(busy_seconds: float) -> dict[str, Any]:
    settings = {
        "application_name": "adaptermesh-store",
        "lock_timeout": _milliseconds(busy_seconds),
        "statement_timeout": _milliseconds(busy_seconds + _STATEMENT_SECONDS),
        # The server finds out by itself that a client has gone without a word, and gives up its locks.
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
    }
    return {
        "timeout": _CONNECT_SECONDS,
        "command_timeout": busy_seconds + _STATEMENT_SECONDS + _ANSWER_SECONDS,
        "server_settings": {name: str(value) for name, value in settings.items()},
    }


def _check_alive(connection: Any, _record: object, _proxy: object) -> None:
    if connection.driver_connection.is_closed():
        raise exc.DisconnectionError


def _milliseconds(seconds: float) -> int:
    # 0 would mean no limit.
    return max(1, round(seconds * 1000))
