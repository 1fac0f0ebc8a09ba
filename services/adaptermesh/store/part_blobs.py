"""The bytes of parts, in the same backend as the blobs of versions but apart from them.

A part is kept until its upload ends. It is never a version's blob, even if it has the same content: so
whether it is needed is asked of the few uploads in progress, not of all versions. As with versions, what
keeps and what removes meet in the database, where one writer goes at a time.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Reason, unavailable
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.database import Database
from adaptermesh.store.reading import FILE_PIECE_BYTES
from adaptermesh.store.schema import feed
from adaptermesh.store.session_rows import (
    count_expired,
    delete_sessions,
    expired_sessions,
    needed_parts,
)
from adaptermesh.store.upload_progress import UploadPart

log = logging.getLogger(__name__)

_CONFIRM_SECONDS = 5.0
_ALIVE_SECONDS = 1.0
# Writers wait while so many are removed.
_REMOVED_AT_ONCE = 16
_EXPIRED_AT_ONCE = 32
_LOOKED_AT_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class PartsReport:
    """What a collection found among the parts."""

    expired_uploads: int
    needed: int
    young: int
    removed: int
    removed_bytes: int
    unfinished: int


class PartBlobs:
    """Keeps, reads and removes parts."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock

    async def recover(self) -> None:
        """Makes the backend ready."""
        await self._blobs.recover()

    async def close(self) -> None:
        """Lets go of the backend."""
        await self._blobs.close()

    async def put(self, digest: str, source: Path) -> None:
        """Keeps the content of a file; what nobody says to need may be removed again."""
        await self._blobs.put(digest, source)

    async def is_there(self, digest: str) -> bool:
        """To be asked in the transaction that says that it is needed. Not for long: other writers wait."""
        try:
            async with asyncio.timeout(_CONFIRM_SECONDS):
                return await self._blobs.stat(digest) is not None
        except TimeoutError as error:
            message = "the part could not be seen in time"
            raise unavailable(Reason.STORE_UNREACHABLE, message, retry_after=1.0) from error

    async def read(self, parts: Iterable[UploadPart]) -> AsyncGenerator[bytes]:
        """The bytes of parts one after the other, in pieces that a message of an upload may have."""
        for part in parts:
            async with self._blobs.open(part.digest) as reader:
                for offset in range(0, part.size_bytes, FILE_PIECE_BYTES):
                    yield await reader.read(offset, min(FILE_PIECE_BYTES, part.size_bytes - offset))

    async def expire(self, *, most: int | None = None) -> int:
        """Forgets uploads that have expired, and their parts; returns how many there were."""
        done = 0
        while most is None or done < most:
            count = _EXPIRED_AT_ONCE if most is None else min(_EXPIRED_AT_ONCE, most - done)

            async def work(connection: AsyncConnection, count: int = count) -> tuple[int, set[str]]:
                ids = await expired_sessions(connection, self._now_us(), count)
                return len(ids), await delete_sessions(connection, ids)

            # Looked for without keeping writers waiting: most often there are none.
            if await self._count_expired() == 0:
                break
            found, digests = await self._database.write(work)
            done += found
            await self.release(digests)
        if done:
            log.info("uploads have expired", extra={"count": done})
        return done

    async def release(self, digests: Iterable[str]) -> list[str]:
        """Removes those parts that no upload needs any more; returns which."""
        removed: list[str] = []
        wanted = sorted(digests)
        for start in range(0, len(wanted), _REMOVED_AT_ONCE):
            batch = wanted[start : start + _REMOVED_AT_ONCE]

            async def work(connection: AsyncConnection, batch: Sequence[str] = batch) -> list[str]:
                # No upload comes to need one of them until this transaction ends.
                needed = await needed_parts(connection, batch, self._now_us())
                unneeded = [digest for digest in batch if digest not in needed]
                for digest in unneeded:
                    await _remove(connection, self._blobs, digest)
                return unneeded

            removed += await self._database.write(work)
        return removed

    async def collect(self, before: float, *, dry_run: bool) -> PartsReport:
        """Removes what has expired, and parts older than `before` that no upload needs."""
        expired = await self._count_expired() if dry_run else await self.expire()
        unneeded: dict[str, int] = {}
        needed = young = 0
        page: dict[str, tuple[int, float]] = {}

        async def look() -> None:
            nonlocal needed, young
            async with self._database.reading() as connection:
                wanted = await needed_parts(connection, list(page), self._now_us())
            needed += len(wanted)
            for digest in page.keys() - wanted:
                size, modify_time = page[digest]
                if modify_time >= before:
                    young += 1
                else:
                    unneeded[digest] = size
            page.clear()

        async for blob in self._blobs.scan():
            page[blob.digest] = (blob.size_bytes, blob.modify_time)
            if len(page) == _LOOKED_AT_AT_ONCE:
                await look()
        await look()
        removed = list(unneeded) if dry_run else await self.release(unneeded)
        finish = self._blobs.unfinished if dry_run else self._blobs.discard_unfinished
        return PartsReport(
            expired_uploads=expired,
            needed=needed,
            young=young,
            removed=len(removed),
            removed_bytes=sum(unneeded[digest] for digest in removed),
            unfinished=await finish(before),
        )

    async def _count_expired(self) -> int:
        async with self._database.reading() as connection:
            return await count_expired(connection, self._now_us())

    def _now_us(self) -> int:
        return int(self._clock.wall() * 1e6)


async def _remove(connection: AsyncConnection, blobs: BlobStore, digest: str) -> None:
    """Returns when nothing is being removed any more, also after an error."""
    deletion = asyncio.ensure_future(blobs.delete(digest))
    try:
        while not (await asyncio.wait([deletion], timeout=_ALIVE_SECONDS))[0]:
            # A database may end a transaction that says nothing, and let others publish meanwhile.
            await connection.execute(select(feed.c.id))
    finally:
        await deletion
