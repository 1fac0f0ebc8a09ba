"""The feed's retention: old changes are trimmed in small batches, by whichever store comes first.

A snapshot is always newer than what is trimmed, so whoever comes too late for the changes takes one.
"""

import logging
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.store.database import Database
from adaptermesh.store.schema import changes, feed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """Which changes stay: those that are young enough and not too many, and always the last ones."""

    max_age_seconds: float = 30 * 24 * 3600.0
    max_changes: int = 1_000_000
    min_changes: int = 10_000
    """The last ones, however old; but never more than `max_changes`."""
    batch_size: int = 1000
    """Changes that go in one transaction, for which other writers wait."""


class FeedTrimmer:
    """Trims the feed; any number of stores may, at any time.

    Each batch is one transaction that deletes changes and moves the trimmed position: a crash leaves both or
    neither, and what another store has trimmed meanwhile is not touched again.
    """

    def __init__(self, config: RetentionConfig, database: Database, clock: Clock) -> None:
        self._config = config
        self._database = database
        self._clock = clock

    async def trim(self) -> int:
        """Trims all that is too old; returns how many changes this store has trimmed.

        Raises:
            MeshError: UNAVAILABLE; what was trimmed before stays so.
        """
        trimmed = 0
        while await self._is_due():
            trimmed += await self._database.write(self._batch)
        if trimmed:
            log.info("change feed trimmed", extra={"count": trimmed})
        return trimmed

    async def _is_due(self) -> bool:
        # A read first: with nothing to do, which is the rule, no writer waits.
        async with self._database.reading() as connection:
            trimmed, last = await self._range(connection)
        return last > trimmed

    async def _batch(self, connection: AsyncConnection) -> int:
        trimmed, last = await self._range(connection)
        if last > trimmed:
            await connection.execute(delete(changes).where(changes.c.position <= last))
            await connection.execute(update(feed).values(trimmed_position=last))
        return last - trimmed

    async def _range(self, connection: AsyncConnection) -> tuple[int, int]:
        """What is trimmed by now, and the last change of the next batch."""
        state = (await connection.execute(select(feed.c.head_position, feed.c.trimmed_position))).one()
        too_many = state.head_position - self._config.max_changes
        may_go = max(too_many, state.head_position - self._config.min_changes)
        before_us = int((self._clock.wall() - self._config.max_age_seconds) * 1e6)
        query = (
            select(changes.c.position, changes.c.commit_time_us)
            .where(changes.c.position > state.trimmed_position, changes.c.position <= may_go)
            .order_by(changes.c.position)
            .limit(self._config.batch_size)
        )
        last = state.trimmed_position
        for row in await connection.execute(query):
            if row.position > too_many and row.commit_time_us >= before_us:
                break
            last = row.position
        return state.trimmed_position, last
