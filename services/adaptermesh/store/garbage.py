"""Mark and sweep: blobs that no version needs are removed, beside the uploads of any number of stores.

That is safe because both sides meet in the database, where one writer goes at a time. A blob is removed after
a transaction that looked whether a version needs it by now and noted its removal (`removal_notes.py`). An
upload looks in its own transaction, before its version becomes visible, whether its blobs are there and no
removal of them is noted, and puts them again otherwise. So a blob that a version needs is never removed,
whatever the clocks say and whatever hangs or is restarted; the grace only spares uploads in progress from
sending blobs twice.
"""

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store import removal_notes
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.database import Database
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.part_blobs import PartBlobs
from adaptermesh.store.schema import feed, versions

log = logging.getLogger(__name__)

DEFAULT_GRACE_SECONDS = 24 * 3600.0
MAX_GRACE_SECONDS = 10 * 365 * 24 * 3600.0
# Noted in one transaction.
_AT_ONCE = 32
_COLUMNS = (versions.c.digest, versions.c.tensor_digest, versions.c.source_files)


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What a collection found; `dry_run`: and left where it was. Parts of uploads count as blobs."""

    dry_run: bool
    removed_blobs: int = 0
    removed_bytes: int = 0
    needed_blobs: int = 0
    """A version or an upload needs them."""
    young_blobs: int = 0
    """None needs them, but they came within the grace."""
    unfinished_uploads: int = 0
    """Blobs of which only a part had been sent, removed as well."""
    expired_uploads: int = 0
    """Uploads that had begun and to which nothing came for too long."""


class GarbageCollector:
    """Collects one at a time."""

    def __init__(self, database: Database, blobs: BlobStore, parts: PartBlobs, clock: Clock) -> None:
        self._database = database
        self._blobs = blobs
        self._parts = parts
        self._clock = clock
        self._work = OwnedWork()
        self._running = False

    async def close(self) -> None:
        """Waits for the removals that have begun."""
        await self._work.wait()

    async def collect(self, grace_seconds: float, *, dry_run: bool = False) -> GarbageReport:
        """Removes every blob that no version or upload needs and that is older than the grace.

        Raises:
            MeshError: RESOURCE_EXHAUSTED if a collection runs already.
        """
        if self._running:
            message = "garbage is being collected already"
            raise MeshError(Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, message, retry_after=5.0)
        self._running = True
        try:
            report = await self._collect(self._clock.wall() - grace_seconds, dry_run=dry_run)
        finally:
            self._running = False
        log.info("garbage collected", extra=dataclasses.asdict(report))
        return report

    async def remove_unneeded(self, digests: set[str]) -> int:
        """Removes those blobs that no version needs, however young; returns how many there were."""
        if not digests:
            return 0
        position, needed = await self._mark()
        return len(await self._remove(sorted(digests - needed), position))

    async def _collect(self, before: float, *, dry_run: bool) -> GarbageReport:
        position, needed = await self._mark()
        unneeded: dict[str, int] = {}
        needed_blobs = young_blobs = 0
        async for blob in self._blobs.scan():
            if blob.digest in needed:
                needed_blobs += 1
            elif blob.modify_time >= before:
                young_blobs += 1
            else:
                unneeded[blob.digest] = blob.size_bytes
        removed = list(unneeded) if dry_run else await self._remove(list(unneeded), position)
        finish = self._blobs.unfinished if dry_run else self._blobs.discard_unfinished
        unfinished = await finish(before)
        parts = await self._parts.collect(before, dry_run=dry_run)
        return GarbageReport(
            dry_run=dry_run,
            removed_blobs=len(removed) + parts.removed,
            removed_bytes=sum(unneeded[digest] for digest in removed) + parts.removed_bytes,
            needed_blobs=needed_blobs + parts.needed,
            young_blobs=young_blobs + parts.young,
            unfinished_uploads=unfinished + parts.unfinished,
            expired_uploads=parts.expired_uploads,
        )

    async def _mark(self) -> tuple[int, set[str]]:
        """The blobs that versions need, and the feed position up to which that is known."""
        async with self._database.reading() as connection:
            position = (await connection.execute(select(feed.c.head_position))).scalar_one()
            return position, {digest async for digest in needed_blobs(connection)}

    async def forget_removals(self) -> None:
        """For a backend that is this process's alone: whoever noted a removal there has ended."""
        await self._database.write(removal_notes.forget_all)

    async def _remove(self, digests: Sequence[str], position: int) -> list[str]:
        removed: list[str] = []
        for start in range(0, len(digests), _AT_ONCE):
            batch = self._remove_batch(digests[start : start + _AT_ONCE], position)
            # To its end, also if nobody waits for it any more: what was sent is being removed.
            removed += await self._work.finish(batch)
        return removed

    async def _remove_batch(self, digests: Sequence[str], position: int) -> list[str]:
        latest = asyncio.get_running_loop().time() + removal_notes.SEND_SECONDS
        holder = uuid.uuid4().hex

        async def note(connection: AsyncConnection) -> list[str]:
            # Nobody publishes until this transaction ends.
            await connection.execute(select(feed.c.id).with_for_update())
            needed = {digest async for digest in needed_blobs(connection, position)}
            unneeded = [digest for digest in digests if digest not in needed]
            await removal_notes.note(connection, unneeded, holder)
            return unneeded

        unneeded = await self._database.write(note)
        removed: list[str] = []
        sent: set[str] = set()
        try:
            # One by one: if the backend is away, the first one says so.
            for digest in unneeded:
                if asyncio.get_running_loop().time() >= latest:
                    break
                sent.add(digest)
                await self._blobs.delete(digest)
                removed.append(digest)
        finally:
            # What was sent and not answered may still be carried out: that note stays until it expires.
            over = [digest for digest in unneeded if digest in removed or digest not in sent]
            await self._database.write(partial(removal_notes.forget, digests=over, holder=holder))
        return removed


async def needed_blobs(connection: AsyncConnection, after_position: int = 0) -> AsyncIterator[str]:
    """The digests of the blobs of all versions after a feed position; some come more than once."""
    query = select(*_COLUMNS).where(versions.c.feed_position > after_position)
    async for row in await connection.stream(query):
        yield row.digest
        yield row.tensor_digest
        for file in row.source_files:
            yield file["digest"]
