"""What versions were made from: in their manifests, and from there in a table that can be asked."""

import json
import logging
from collections.abc import Sequence

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.access.visibility import visible
from adaptermesh.store.database import Database
from adaptermesh.store.manifests import Manifests
from adaptermesh.store.schema import adapters, unread_lineages, version_parents, versions

log = logging.getLogger(__name__)

_AT_ONCE = 64


async def add_parents(connection: AsyncConnection, version_id: int, digests: Sequence[str]) -> None:
    """Notes what a version was made from."""
    rows = [{"version_id": version_id, "digest": digest} for digest in sorted(set(digests))]
    if rows:
        await connection.execute(insert(version_parents), rows)


async def children_of(connection: AsyncConnection, digest: str, limit: int) -> list[str]:
    """The versions, as `namespace/name:v3`, that were made from the one with a digest, if to be seen."""
    query = (
        select(adapters.c.namespace, adapters.c.name, versions.c.number)
        .join(versions, versions.c.adapter_id == adapters.c.id)
        .join(version_parents, version_parents.c.version_id == versions.c.id)
        .where(version_parents.c.digest == digest)
        .order_by(versions.c.id)
        .limit(limit)
    )
    if (seen := visible()) is not None:
        query = query.where(seen)
    return [f"{row.namespace}/{row.name}:v{row.number}" for row in await connection.execute(query)]


class Lineage:
    """Reads the manifests of versions that an older release published, once, when somebody has to know."""

    def __init__(self, database: Database, manifests: Manifests) -> None:
        self._database = database
        self._manifests = manifests

    async def learn(self, base_digest: str) -> None:
        """Returns when it is known what all versions of a base were made from.

        What was read stays read, also if the caller gives up in the middle. A version whose manifest is
        damaged can't be used, and so counts as made from nothing.
        """
        last_id = 0
        while rows := await self._unread(base_digest, last_id):
            last_id = rows[-1][0]
            read = [(version_id, await self._parents(digest)) for version_id, digest in rows]
            await self._save({version_id: parents for version_id, parents in read if parents is not None})

    async def _unread(self, base_digest: str, last_id: int) -> list[tuple[int, str]]:
        query = (
            select(versions.c.id, versions.c.digest)
            .join(unread_lineages, unread_lineages.c.version_id == versions.c.id)
            .where((versions.c.base_digest == base_digest) & (versions.c.id > last_id))
            .order_by(versions.c.id)
            .limit(_AT_ONCE)
        )
        async with self._database.reading() as connection:
            return [(row.id, row.digest) for row in await connection.execute(query)]

    async def _parents(self, digest: str) -> list[str] | None:
        """None for a manifest that can't be read."""
        try:
            manifest = json.loads(await self._manifests.read(digest))
        except MeshError as error:
            if error.reason is not Reason.DATA_CORRUPT:
                raise
            log.error("the lineage of a version can't be read", extra={"digest": digest})
            return None
        return [str(parent) for parent in manifest.get("parents", ())]

    async def _save(self, found: dict[int, list[str]]) -> None:
        async def work(connection: AsyncConnection) -> None:
            # Another store may have been faster, or have removed the version.
            mine = unread_lineages.c.version_id.in_(sorted(found))
            query = delete(unread_lineages).where(mine).returning(unread_lineages.c.version_id)
            for version_id in (await connection.execute(query)).scalars().all():
                await add_parents(connection, version_id, found[version_id])

        await self._database.write(work)
