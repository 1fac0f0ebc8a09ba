"""How often versions are downloaded: counted in memory, and added to the database now and then.

No change of the feed: nothing that is served depends on a count, every download would wake every watcher, and
the feed would forget what matters for the sake of what doesn't. A store that is killed loses what it has
counted since the last time.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.artifact.source_files import CARD_FILE
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import invalid_field
from adaptermesh.store.access.visibility import visible
from adaptermesh.store.database import Database
from adaptermesh.store.records import SourceFile, VersionRecord
from adaptermesh.store.schema import adapters, version_downloads, versions

log = logging.getLogger(__name__)

MAX_ASKED = 1000
"""Versions that can be asked for at once."""
_MAX_COUNTED = 10_000
"""Versions that are counted between two writes; downloads of further ones are not."""
_AT_ONCE = 200


class DownloadCounts:
    """Counts the downloads of one store; what it writes is added to what others wrote."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted: Counter[str] = Counter()

    def note_file(self, version: VersionRecord, file: SourceFile, offset: int) -> None:
        """Notes that a file is sent. It counts where it is the largest, from its beginning.

        So a download of all files counts once, one that is resumed not again, a look at the card not at all.
        """
        if offset == 0 and file == _largest(version):
            self._note(version.digest)

    def note_canonical(self, version: VersionRecord, offset: int) -> None:
        """Notes that the canonical form is sent; it counts from its beginning."""
        if offset == 0:
            self._note(version.digest)

    async def flush(self) -> None:
        """Adds what was counted to the database.

        Raises:
            MeshError: UNAVAILABLE; what is not written yet is kept for the next time. What was written just
                before the database was lost may count twice.
        """
        while self._counted:
            batch = dict(self._counted.most_common(_AT_ONCE))

            async def work(connection: AsyncConnection, batch: Mapping[str, int] = batch) -> None:
                await _add(connection, batch)

            await self._database.write(work)
            # Only now: who gives up waiting loses nothing.
            self._counted -= Counter(batch)

    async def counts(self, digests: Sequence[str]) -> list[int]:
        """How often each of these versions was downloaded; 0 for one that is not there, or not to be seen.

        Raises:
            MeshError: INVALID_FIELD.
        """
        if len(digests) > MAX_ASKED:
            raise invalid_field("digests", f"at most {MAX_ASKED} are allowed")
        if not all(map(is_digest, digests)):
            raise invalid_field("digests", "must be sha256:<64 lower-case hex digits>")
        found: dict[str, int] = {}
        query = select(versions.c.digest, version_downloads.c.count).join(version_downloads)
        if (seen := visible()) is not None:
            query = query.join(adapters, adapters.c.id == versions.c.adapter_id).where(seen)
        async with self._database.reading() as connection:
            for start in range(0, len(digests), _AT_ONCE):
                some = query.where(versions.c.digest.in_(digests[start : start + _AT_ONCE]))
                found.update({row.digest: row[1] for row in await connection.execute(some)})
        return [found.get(digest, 0) for digest in digests]

    def _note(self, digest: str) -> None:
        if digest in self._counted or len(self._counted) < _MAX_COUNTED:
            self._counted[digest] += 1


def _largest(version: VersionRecord) -> SourceFile | None:
    """The file that makes a download one; None for a version of nothing but a card."""
    files = [file for file in version.source_files if file.path != CARD_FILE]
    return max(files, key=lambda file: (file.size_bytes, file.path), default=None)


async def _add(connection: AsyncConnection, batch: Mapping[str, int]) -> None:
    # Nobody else writes meanwhile, so what has no row now gets it here.
    query = (
        select(versions.c.id, versions.c.digest, versions.c.adapter_id, version_downloads.c.version_id)
        .outerjoin(version_downloads)
        .where(versions.c.digest.in_(batch))
    )
    rows = (await connection.execute(query)).all()
    new = [{"version_id": row.id, "count": batch[row.digest]} for row in rows if row.version_id is None]
    known = [{"of": row.id, "more": batch[row.digest]} for row in rows if row.version_id is not None]
    if new:
        await connection.execute(insert(version_downloads), new)
    if known:
        column = version_downloads.c
        more = update(version_downloads).where(column.version_id == bindparam("of"))
        await connection.execute(more.values(count=column["count"] + bindparam("more")), known)
    of_adapters: Counter[int] = Counter()
    for row in rows:
        of_adapters[row.adapter_id] += batch[row.digest]
    if of_adapters:
        more = update(adapters).where(adapters.c.id == bindparam("of"))
        total = more.values(download_count=adapters.c.download_count + bindparam("more"))
        counts = [{"of": adapter_id, "more": count} for adapter_id, count in of_adapters.items()]
        await connection.execute(total, counts)
