"""Versions that are removed for good. What is left of one is its number, and who removed it, when and why."""

import asyncio
import json
import logging
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Table, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.artifact.source_files import CARD_FILE
from adaptermesh.core.clock import Clock
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.core.refs import AdapterName, Ref
from adaptermesh.store import schema
from adaptermesh.store.access.quotas import count_out
from adaptermesh.store.alias_rows import aliases_of
from adaptermesh.store.blobs import BlobStore
from adaptermesh.store.database import Database
from adaptermesh.store.documents import Findable, remove_document, write_document
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import MAX_ACTOR, MAX_COMMENT, check_text, check_version_number
from adaptermesh.store.lineage import Lineage, children_of
from adaptermesh.store.manifests import Manifests
from adaptermesh.store.records import ChangeKind, DeletedVersion, VersionRecord
from adaptermesh.store.resolution import find_adapter, find_version
from adaptermesh.store.routes import routes_to
from adaptermesh.store.rows import SELECT_VERSIONS, StoredVersion, stored_version
from adaptermesh.store.schema import adapters, deleted_versions, versions
from adaptermesh.store.search_facts import NO_FACTS, SearchFacts, search_facts
from adaptermesh.store.words import MAX_CARD_CHARACTERS, word_index

log = logging.getLogger(__name__)

_NAMED = 10
"""Of what uses a version so many are named."""
_ATTEMPTS = 3
_LEARN_SECONDS = 5.0
_OWNED: tuple[Table, ...] = (
    schema.version_tags,
    schema.version_statuses,
    schema.version_signatures,
    schema.version_parents,
    schema.unread_lineages,
    schema.version_downloads,
)
"""Tables of rows that go with their version."""


@dataclass(frozen=True, slots=True)
class RemovalRequest:
    """Which version is to go, and which digest its number has for whoever asks; who, and why."""

    adapter: AdapterName
    version_number: int
    digest: str
    actor: str = ""
    reason: str = ""

    @property
    def ref(self) -> Ref:
        return Ref(self.adapter, version=self.version_number)


@dataclass(frozen=True, slots=True)
class _Successor:
    """The version by which the adapter is found when another one is gone."""

    number: int
    found_by: Findable


class Removals:
    """Removes versions that nothing uses."""

    def __init__(self, database: Database, clock: Clock, blobs: BlobStore, manifests: Manifests) -> None:
        self._database = database
        self._manifests = manifests
        self._clock = clock
        self._blobs = blobs
        self._lineage = Lineage(database, manifests)
        self._words = word_index(database.dialect)

    async def delete(self, request: RemovalRequest) -> tuple[DeletedVersion, int]:
        """Removes a version; returns what is left of it, and the feed position.

        Its number is never given again. Its bytes are garbage then, unless another version needs them.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, VERSION_DELETED; FAILED_PRECONDITION
                (DIGEST_MISMATCH), or (VERSION_IN_USE) if an alias points at it, a route names it or another
                version was made from it.
        """
        _check(request)
        for _ in range(_ATTEMPTS):
            successor = await self._prepare(request)
            try:
                deleted, position = await self._database.write(partial(self._remove, request, successor))
            except _NewerVersion:
                continue
            log.info(
                "version removed",
                extra={"version": deleted.ref, "digest": deleted.digest, "feed_position": position},
            )
            return deleted, position
        message = "other versions of the adapter come and go meanwhile"
        raise unavailable(Reason.OVERLOADED, message, retry_after=1.0)

    async def _prepare(self, request: RemovalRequest) -> _Successor | None:
        """What needs the bytes of other versions, which no transaction waits for."""
        async with self._database.reading() as connection:
            adapter_id = await find_adapter(connection, request.adapter)
            version = (await find_version(connection, request.ref)).record
            _compare(request, version)
            await _check_unused(connection, adapter_id, version)
            successor = await _next_newest(connection, adapter_id, version.number)
        await self._learn(version)
        if successor is None:
            return None
        found_by = Findable(await self._card(successor.record), await self._facts(successor.record))
        return _Successor(successor.record.number, found_by)

    async def _learn(self, version: VersionRecord) -> None:
        try:
            async with asyncio.timeout(_LEARN_SECONDS):
                # What was made from it is of the same base.
                await self._lineage.learn(version.base_digest)
        except TimeoutError as error:
            message = "what the versions of an older release were made from is still being read"
            raise unavailable(Reason.OVERLOADED, message, retry_after=1.0) from error

    async def _card(self, version: VersionRecord) -> str:
        """As an upload has it; without it, if it is damaged, the adapter is still found by the rest."""
        card = next((file for file in version.source_files if file.path == CARD_FILE), None)
        if card is None or not card.size_bytes:
            return ""
        try:
            async with self._blobs.open(card.digest) as reader:
                data = await reader.read(0, min(reader.size, MAX_CARD_CHARACTERS))
        except MeshError as error:
            if error.reason is not Reason.DATA_CORRUPT:
                raise
            return ""
        return data.decode(errors="replace")

    async def _facts(self, version: VersionRecord) -> SearchFacts:
        """From the manifest; none if it is damaged."""
        try:
            manifest = json.loads(await self._manifests.read(version.digest))
        except MeshError as error:
            if error.reason is not Reason.DATA_CORRUPT:
                raise
            return NO_FACTS
        return search_facts(manifest.get("languages", ()), manifest.get("metrics", ()))

    async def _remove(
        self, request: RemovalRequest, successor: _Successor | None, connection: AsyncConnection
    ) -> tuple[DeletedVersion, int]:
        adapter_id = await find_adapter(connection, request.adapter)
        version = (await find_version(connection, request.ref)).record
        _compare(request, version)
        await _check_unused(connection, adapter_id, version)
        await self._hand_over(connection, adapter_id, version, successor)
        await _delete_rows(connection, version)
        await count_out(connection, version)
        now_us = int(self._clock.wall() * 1e6)
        deleted = DeletedVersion(
            namespace=version.namespace,
            name=version.name,
            number=version.number,
            digest=version.digest,
            delete_time_us=now_us,
            actor=request.actor,
            reason=request.reason,
        )
        await _bury(connection, adapter_id, deleted)
        return deleted, await append_change(connection, ChangeKind.VERSION_DELETED, deleted, now_us)

    async def _hand_over(
        self,
        connection: AsyncConnection,
        adapter_id: int,
        version: VersionRecord,
        successor: _Successor | None,
    ) -> None:
        """The adapter is found by its newest version: by the one before it, if that is the one that goes."""
        newest = select(adapters.c.newest_number).where(adapters.c.id == adapter_id)
        if (await connection.execute(newest)).scalar_one() != version.number:
            return
        found = await _next_newest(connection, adapter_id, version.number)
        number = 0 if found is None else found.record.number
        if number != (0 if successor is None else successor.number):
            raise _NewerVersion
        same = adapters.c.id == adapter_id
        await connection.execute(update(adapters).where(same).values(newest_number=number))
        if found is None or successor is None:
            await remove_document(connection, self._words, adapter_id)
            return
        query = select(versions.c.id).where(versions.c.digest == found.record.digest)
        version_id = int((await connection.execute(query)).scalar_one())
        await write_document(connection, self._words, found, adapter_id, version_id, successor.found_by)


class _NewerVersion(Exception):
    """Another version than the one whose card was read is the newest one now."""


async def _next_newest(connection: AsyncConnection, adapter_id: int, number: int) -> StoredVersion | None:
    """The newest version of an adapter but for one."""
    others = (versions.c.adapter_id == adapter_id) & (versions.c.number != number)
    query = SELECT_VERSIONS.where(others).order_by(versions.c.number.desc()).limit(1)
    row = (await connection.execute(query)).first()
    return None if row is None else stored_version(row)


async def _check_unused(connection: AsyncConnection, adapter_id: int, version: VersionRecord) -> None:
    adapter = version.adapter
    spellings = (Ref(adapter, version=version.number), Ref(adapter, digest=version.digest))
    users = {
        "aliases": await aliases_of(connection, adapter_id, version.number, _NAMED),
        "routes": (await routes_to(connection, *spellings))[:_NAMED],
        "versions": await children_of(connection, version.digest, _NAMED),
    }
    named = {kind: ", ".join(found) for kind, found in users.items() if found}
    if not named:
        return
    words = {
        "aliases": "aliases point at it",
        "routes": "routes name it",
        "versions": "versions were made from it",
    }
    why = "; ".join(f"{words[kind]}: {found}" for kind, found in named.items())
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.VERSION_IN_USE,
        f"'{version.ref}' can't be removed: {why}",
        metadata={"name": version.ref, "digest": version.digest, **named},
    )


async def _delete_rows(connection: AsyncConnection, version: VersionRecord) -> None:
    query = select(versions.c.id).where(versions.c.digest == version.digest)
    version_id = (await connection.execute(query)).scalar_one()
    for table in _OWNED:
        await connection.execute(delete(table).where(table.c.version_id == version_id))
    await connection.execute(delete(versions).where(versions.c.id == version_id))


async def _bury(connection: AsyncConnection, adapter_id: int, deleted: DeletedVersion) -> None:
    count = update(adapters).where(adapters.c.id == adapter_id)
    await connection.execute(count.values(deleted_count=adapters.c.deleted_count + 1))
    await connection.execute(
        insert(deleted_versions).values(
            adapter_id=adapter_id,
            number=deleted.number,
            digest=deleted.digest,
            delete_time_us=deleted.delete_time_us,
            actor=deleted.actor,
            reason=deleted.reason,
        )
    )


def _check(request: RemovalRequest) -> None:
    check_version_number(request.version_number)
    if not is_digest(request.digest):
        raise invalid_field("digest", "must be sha256:<64 lower-case hex digits>")
    check_text("actor", request.actor, MAX_ACTOR)
    check_text("reason", request.reason, MAX_COMMENT)


def _compare(request: RemovalRequest, version: VersionRecord) -> None:
    if request.digest == version.digest:
        return
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.DIGEST_MISMATCH,
        f"'{version.ref}' has digest {version.digest}, not {request.digest}",
        metadata={"name": version.ref, "digest": version.digest, "expected_digest": request.digest},
    )
