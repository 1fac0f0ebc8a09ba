"""The whole catalogue as of one feed position."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.roles import DEFAULT_TENANT
from adaptermesh.store.access.records import NamespaceRecord
from adaptermesh.store.access.rows import grant_record
from adaptermesh.store.database import Database
from adaptermesh.store.feed import feed_head
from adaptermesh.store.records import Record
from adaptermesh.store.rows import (
    SELECT_ALIASES,
    SELECT_DELETED,
    SELECT_VERSIONS,
    alias_record,
    base_model_record,
    deleted_version,
    policy_record,
    route_record,
    version_record,
)
from adaptermesh.store.schema import (
    alias_moves,
    base_models,
    deleted_versions,
    grants,
    namespace_policies,
    namespaces,
    routes,
    versions,
)

_ITEMS_AHEAD = 64


@dataclass(frozen=True, slots=True)
class SnapshotConfig:
    """How many snapshots are read and for how long: each keeps a read transaction open."""

    concurrent: int = 4
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class SnapshotItem:
    """One record of a snapshot; `record` is None in the first item, which only says which snapshot it is."""

    feed_id: str
    feed_position: int
    record: Record | None


class Snapshots:
    """Reads snapshots; no more than a few at a time, the others wait."""

    def __init__(self, database: Database, config: SnapshotConfig) -> None:
        self._database = database
        self._config = config
        self._places = asyncio.Semaphore(config.concurrent)

    async def read(self) -> AsyncGenerator[SnapshotItem]:
        """Yields what there is, what was removed and who may do what: from one transaction.

        Raises:
            MeshError: DEADLINE_EXCEEDED if the reader is too slow.
        """
        # The transaction belongs to a task of its own, which can be stopped while the reader is stuck.
        items: asyncio.Queue[SnapshotItem | None] = asyncio.Queue()
        room = asyncio.Semaphore(_ITEMS_AHEAD)
        producer = asyncio.create_task(self._produce(items, room))
        try:
            while (item := await items.get()) is not None:
                room.release()
                yield item
            await producer
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)

    async def _produce(self, items: asyncio.Queue[SnapshotItem | None], room: asyncio.Semaphore) -> None:
        try:
            async with (
                asyncio.timeout(self._config.seconds),
                self._places,
                self._database.reading() as connection,
            ):
                feed_id, position = await feed_head(connection)
                items.put_nowait(SnapshotItem(feed_id, position, None))
                async for record in _records(connection):
                    await room.acquire()
                    items.put_nowait(SnapshotItem(feed_id, position, record))
        except TimeoutError as error:
            raise MeshError(
                Code.DEADLINE_EXCEEDED,
                Reason.DEADLINE_EXCEEDED,
                f"the snapshot was not read within {self._config.seconds:g} s",
            ) from error
        finally:
            items.put_nowait(None)


async def _records(connection: AsyncConnection) -> AsyncGenerator[Record]:
    async for row in await connection.stream(select(base_models).order_by(base_models.c.feed_position)):
        yield base_model_record(row)
    async for row in await connection.stream(SELECT_VERSIONS.order_by(versions.c.id)):
        yield version_record(row)
    removed = SELECT_DELETED.order_by(deleted_versions.c.adapter_id, deleted_versions.c.number)
    async for row in await connection.stream(removed):
        yield deleted_version(row)
    query = SELECT_ALIASES.order_by(alias_moves.c.adapter_id, alias_moves.c.alias)
    async for row in await connection.stream(query):
        yield alias_record(row)
    policies = select(namespace_policies).order_by(namespace_policies.c.namespace)
    async for row in await connection.stream(policies):
        yield policy_record(row)
    given = select(namespaces).where(namespaces.c.tenant != DEFAULT_TENANT).order_by(namespaces.c.name)
    async for row in await connection.stream(given):
        yield NamespaceRecord(row.name, row.tenant)
    order = (grants.c.namespace, grants.c.name, grants.c.grantee)
    async for row in await connection.stream(select(grants).order_by(*order)):
        yield grant_record(row)
    live = select(routes).where(routes.c.deleted.is_(False)).order_by(routes.c.tenant, routes.c.task)
    async for row in await connection.stream(live):
        yield route_record(row)
