"""Blobs that are being removed: noted in the database before the backend is asked, until it has done it.

A removal that was sent can't be called back: a backend that hangs, or a request that was given up, may carry
it out later, and the transaction that decided on it may be over by then, even undone. So no version may count
on a blob whose removal is noted. A note whose removal never came to an end, since the process died or the
backend did not answer, holds until it expires: by then the removal has been carried out or never will be.
Several processes may send the same removal, since no version needs the blob: each has a note of its own.
"""

import datetime
from collections.abc import Iterable

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.store.schema import blob_removals

SEND_SECONDS = 10.0
"""After a note its removal is sent within this time, or not at all."""
NOTE_SECONDS = 240.0
"""How long a note holds by itself: that time, what a request may wait for its turn and then for its answer
(some 95 s each), and a little more."""


async def note(connection: AsyncConnection, digests: Iterable[str], holder: str) -> None:
    """Notes removals, in the writers' transaction.

    Args:
        connection: in the transaction in which it was seen that no version needs the blobs.
        digests: theirs.
        holder: who sends the removals; nobody else may use that name.
    """
    now = await _now_us(connection)
    await connection.execute(delete(blob_removals).where(blob_removals.c.expire_time_us <= now))
    expire = now + int(NOTE_SECONDS * 1e6)
    rows = [{"digest": digest, "holder": holder, "expire_time_us": expire} for digest in digests]
    if rows:
        await connection.execute(insert(blob_removals), rows)


async def forget(connection: AsyncConnection, digests: Iterable[str], holder: str) -> None:
    """Takes back a holder's notes, of removals that came to an end or were never sent."""
    same = blob_removals.c.digest.in_(list(digests)) & (blob_removals.c.holder == holder)
    await connection.execute(delete(blob_removals).where(same))


async def forget_all(connection: AsyncConnection) -> None:
    """For a backend on which no removal can outlive the process that sent it."""
    await connection.execute(delete(blob_removals))


async def seconds_left(connection: AsyncConnection, digests: Iterable[str]) -> float | None:
    """How long the notes of these blobs hold at most; None if there is none.

    In the writers' transaction none can be added before it ends.
    """
    query = select(func.max(blob_removals.c.expire_time_us)).where(blob_removals.c.digest.in_(list(digests)))
    latest = (await connection.execute(query)).scalar()
    left = 0 if latest is None else latest - await _now_us(connection)
    return left / 1e6 if left > 0 else None


async def _now_us(connection: AsyncConnection) -> int:
    """By the database's clock, which all stores share: of when the transaction began, at the latest."""
    now: datetime.datetime = (await connection.execute(select(func.current_timestamp()))).scalar_one()
    # SQLite gives UTC and does not say so.
    return int((now if now.tzinfo else now.replace(tzinfo=datetime.UTC)).timestamp() * 1e6)
