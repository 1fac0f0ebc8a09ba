"""Blobs that are being removed: noted in the database before the backend is asked, until it has done it.

A removal that was sent can't be called back: a backend that hangs, or a request that was given up, may carry
it out later, and the transaction that decided on it may be over by then, even undone. So no version may count
on a blob whose removal is noted. A note whose removal never came to an end, since the process died or the
backend did not answer, holds until it expires: by then the removal has been carried out or never will be.
Meanwhile others may send the removal too, since no version needs the blob. Then nobody knows when the last
one is over, and the note is left to expire.
"""

import datetime
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.schema import blob_removals

SEND_SECONDS = 10.0
"""After a note its removal is sent within this time, or not at all."""
NOTE_SECONDS = 180.0
"""How long a note holds by itself: that time, the longest that a request is waited for, and a minute more."""


@dataclass(frozen=True, slots=True)
class Notes:
    """Removals that one process may send now."""

    digests: tuple[str, ...]
    own: frozenset[str]
    """Those that nobody else had noted."""
    expire_time_us: int


async def note(connection: AsyncConnection, digests: Iterable[str]) -> Notes:
    """Notes removals, in the writers' transaction."""
    now = await _now_us(connection)
    await connection.execute(delete(blob_removals).where(blob_removals.c.expire_time_us <= now))
    wanted = tuple(dict.fromkeys(digests))
    others = await _noted(connection, wanted)
    # Never one that is there: it tells whose the note is.
    expire = max(now + int(NOTE_SECONDS * 1e6), *(1 + time for time in others.values()), 0)
    same = blob_removals.c.digest.in_(others)
    await connection.execute(update(blob_removals).where(same).values(expire_time_us=expire))
    own = [digest for digest in wanted if digest not in others]
    if own:
        rows = [{"digest": digest, "expire_time_us": expire} for digest in own]
        await connection.execute(insert(blob_removals), rows)
    return Notes(wanted, frozenset(own), expire)


async def forget(connection: AsyncConnection, notes: Notes, over: Iterable[str]) -> None:
    """Takes back the notes of removals that came to an end, or were never sent, if nobody else sends them."""
    own = notes.own.intersection(over)
    same = blob_removals.c.digest.in_(own) & (blob_removals.c.expire_time_us == notes.expire_time_us)
    await connection.execute(delete(blob_removals).where(same))


async def forget_all(connection: AsyncConnection) -> None:
    """For a backend on which no removal can outlive the process that sent it."""
    await connection.execute(delete(blob_removals))


async def seconds_left(connection: AsyncConnection, digests: Iterable[str]) -> float | None:
    """How long the notes of these blobs hold at most; None if there is none.

    In the writers' transaction none can be added before it ends.
    """
    expiries = await _noted(connection, list(digests))
    left = max(expiries.values(), default=0) - await _now_us(connection) if expiries else 0
    return left / 1e6 if left > 0 else None


async def _noted(connection: AsyncConnection, digests: Collection[str]) -> dict[str, int]:
    query = select(blob_removals).where(blob_removals.c.digest.in_(digests))
    return {row.digest: row.expire_time_us for row in await connection.execute(query)}


async def _now_us(connection: AsyncConnection) -> int:
    """By the database's clock, which all stores share: of when the transaction began, at the latest."""
    now: datetime.datetime = (await connection.execute(select(func.current_timestamp()))).scalar_one()
    # SQLite gives UTC and does not say so.
    return int((now if now.tzinfo else now.replace(tzinfo=datetime.UTC)).timestamp() * 1e6)
