"""What other processes tell through PostgreSQL: a connection that listens, and comes back when it is lost."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from asyncpg import InterfaceError, PostgresError
from sqlalchemy import URL, exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from adaptermesh.core.backoff import Backoff

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_PROBE_SECONDS = 15.0
_PROBE_TIMEOUT_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
# SQLAlchemy's while it connects, then the driver's own.
_FAILURES = (exc.DBAPIError, InterfaceError, PostgresError, OSError)


class Listener:
    """Listens on one channel, apart from the pool.

    Args:
        url: the database.
        connect_args: of the driver.
        channel: where the notifications come.
        own: the payload of this process's own notifications, which it needs not hear.
    """

    def __init__(self, url: URL, connect_args: Mapping[str, Any], channel: str, own: str) -> None:
        self._engine = create_async_engine(url, connect_args=dict(connect_args), poolclass=NullPool)
        self._channel = channel
        self._own = own

    async def run(self, on_change: Callable[[], None]) -> None:
        """Calls `on_change` for each notification, and after each (re)connect; until it is cancelled."""
        pauses = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, random.Random())  # noqa: S311 (no secret)
        while True:
            try:
                async with self._connection(on_change) as connection:
                    log.info("listening for other stores")
                    pauses.reset()
                    # What was committed meanwhile was told to nobody.
                    on_change()
                    await _until_lost(connection)
            except _FAILURES as error:
                # The driver's own words may name the user, never the password.
                log.warning("can't listen for other stores", extra={"reason": str(error)[:200]})
            else:
                log.warning("other stores can't be heard: the connection is lost")
            await asyncio.sleep(pauses.next_delay())

    @asynccontextmanager
    async def _connection(self, on_change: Callable[[], None]) -> AsyncGenerator[Any]:
        def hear(_connection: object, _process: int, _channel: str, payload: object) -> None:
            if payload != self._own:
                on_change()

        async with self._engine.connect() as connection:
            # No transaction is begun on it: a listener in one hears nothing.
            driver: Any = (await connection.get_raw_connection()).driver_connection
            try:
                await driver.add_listener(self._channel, hear)
                yield driver
            finally:
                with suppress(*_FAILURES):
                    await driver.close(timeout=_CLOSE_SECONDS)


async def _until_lost(connection: Any) -> None:
    """Returns when the server has closed the connection; asks now and then whether it is still there."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    while not (lost.is_set() or connection.is_closed()):
        try:
            # Not `wait_for`: it forgets a cancellation that comes with the event.
            async with asyncio.timeout(_PROBE_SECONDS):
                await lost.wait()
        except TimeoutError:
            await connection.execute("SELECT 1", timeout=_PROBE_TIMEOUT_SECONDS)
