"""Base models and versions: registering, publishing, finding."""

import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import Clock
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import (
    Code,
    MeshError,
    Reason,
    invalid_field,
    not_found,
    unavailable,
)
from adaptermesh.core.refs import AdapterName, Ref
from adaptermesh.store.access.quotas import count_in
from adaptermesh.store.database import Database
from adaptermesh.store.documents import Findable, write_document
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import check_line
from adaptermesh.store.lineage import add_parents
from adaptermesh.store.lookup import Lookup
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import BaseModelRecord, ChangeKind, VersionRecord
from adaptermesh.store.resolution import (
    find_adapter,
    find_digest,
    find_version,
    get_digest,
)
from adaptermesh.store.rows import (
    SELECT_VERSIONS,
    StoredVersion,
    base_model_record,
    version_record,
    version_values,
)
from adaptermesh.store.schema import (
    adapters,
    base_models,
    version_tags,
    versions,
)
from adaptermesh.store.search_facts import NO_FACTS, SearchFacts
from adaptermesh.store.usability import find_usable, get_usable, why_not
from adaptermesh.store.words import word_index

log = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of a publication."""

    version: StoredVersion
    created: bool


class Catalogue:
    """The base models and the versions."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._lookup = Lookup(database)
        self._words = word_index(database.dialect)
        self._clock = clock

    async def register_base_model(self, base: BaseModelRecord) -> tuple[bool, int]:
        """Makes a base model known; returns whether it was new, and its feed position.

        Raises:
            MeshError: INVALID_ARGUMENT if a fact or a digest doesn't follow from the config.
        """
        _check_base_model(base)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[bool, int]:
            query = select(base_models.c.feed_position).where(base_models.c.digest == base.digest)
            known = (await connection.execute(query)).scalar()
            if known is not None:
                return False, int(known)
            position = await append_change(connection, ChangeKind.BASE_MODEL_REGISTERED, base, now_us)
            row = {**dataclasses.asdict(base), "feed_position": position}
            await connection.execute(insert(base_models).values(row))
            return True, position

        created, position = await self._database.write(work)
        if created:
            log.info("base model registered", extra={"model_id": base.model_id, "digest": base.digest})
        return created, position

    async def find_base_model(self, name_or_digest: str) -> BaseModelRecord:
        """The base model with a digest, or with a name that just one has.

        Raises:
            MeshError: BASE_NOT_FOUND; INVALID_FIELD if the name means several.
        """
        column = base_models.c.digest if is_digest(name_or_digest) else base_models.c.model_id
        async with self._database.reading() as connection:
            query = select(base_models).where(column == name_or_digest).limit(2)
            rows = (await connection.execute(query)).all()
        if not rows:
            raise not_found(Reason.BASE_NOT_FOUND, "base model", name_or_digest[:200])
        if len(rows) > 1:
            raise invalid_field(
                "base_model", f"several base models are named '{name_or_digest}': give the digest"
            )
        return base_model_record(rows[0])

    async def list_base_models(self, request: PageRequest) -> Page[BaseModelRecord]:
        """The base models by name and digest."""

        def key(base: BaseModelRecord) -> Key:
            return base.model_id, base.digest

        pager = Pager(request, ["base_models"], key, (str, str))
        query = select(base_models).order_by(base_models.c.model_id, base_models.c.digest).limit(pager.limit)
        if pager.after is not None:
            name, digest = pager.after
            same = (base_models.c.model_id == name) & (base_models.c.digest > digest)
            query = query.where((base_models.c.model_id > name) | same)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        return pager.page([base_model_record(row) for row in rows])

    async def publish(
        self,
        version: VersionRecord,
        tensor_digest: str,
        card: str = "",
        confirm: Callable[[AsyncConnection], Awaitable[None]] | None = None,
        parents: Sequence[str] = (),
        facts: SearchFacts = NO_FACTS,
    ) -> Published:
        """Publishes a version under the adapter's next number, unless the same content is there already.

        Args:
            version: its number and time are set here.
            tensor_digest: the blob of the canonical tensor file.
            card: the text by which it can be found, beside its own fields.
            confirm: called in the transaction, when no other writer can come in between any more; what it
                raises prevents the publication.
            parents: the digests of the versions it was made from, which must be there.
            facts: what else of the card can be searched.

        Raises:
            MeshError: VERSION_NOT_FOUND or VERSION_DELETED for a parent.
        """
        stamped = dataclasses.replace(version, create_time_us=int(self._clock.wall() * 1e6))

        async def work(connection: AsyncConnection) -> Published:
            known = await find_digest(connection, version.digest)
            if known is not None:
                return Published(known, created=False)
            for digest in parents:
                # It was there when the upload began, and may have been removed since.
                await get_digest(connection, digest)
            await count_in(connection, stamped)
            stored, adapter_id, version_id = await _insert(connection, stamped, tensor_digest)
            await add_parents(connection, version_id, parents)
            found_by = Findable(card, facts)
            await write_document(connection, self._words, stored, adapter_id, version_id, found_by)
            if confirm is not None:
                # Here, because from its first change on the transaction has the writers' lock.
                await confirm(connection)
            return Published(stored, created=True)

        return await self._database.write(work)

    async def find_digest(self, digest: str) -> StoredVersion | None:
        """The version with a digest, if there is one."""
        return await self._lookup.find_digest(digest)

    async def get_digest(self, digest: str) -> StoredVersion:
        """The version with a digest; raises MeshError VERSION_NOT_FOUND, VERSION_DELETED or INVALID_FIELD."""
        found = await self.find_digest(digest) if is_digest(digest) else None
        if found is not None:
            return found
        async with self._database.reading() as connection:
            return await get_digest(connection, digest)

    async def usable_digest(self, digest: str) -> StoredVersion:
        """The same, for a worker that is to serve it; also raises VERSION_REVOKED, VERSION_UNSIGNED."""
        async with self._database.reading() as connection:
            return await get_usable(connection, digest)

    async def resolve(
        self, ref: Ref, *, include_unusable: bool = False
    ) -> tuple[StoredVersion, tuple[str, ...]]:
        """The version that a ref means now, and every alias that points at it.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, VERSION_DELETED, ALIAS_NOT_FOUND;
                VERSION_REVOKED and VERSION_UNSIGNED unless such a version is wanted too.
        """
        found = await self._lookup.find(ref)
        if found is None:
            raise await self._what_is_missing(ref)
        problem = None if include_unusable else why_not(str(ref), found.version.record, found.policy)
        if problem is not None:
            # Once more, with the keys of the tenant: they are not looked up for what needs none.
            async with self._database.reading() as connection:
                await find_usable(connection, ref)
        return found.version, found.aliases

    async def _what_is_missing(self, ref: Ref) -> MeshError:
        try:
            async with self._database.reading() as connection:
                await find_version(connection, ref)
        except MeshError as error:
            return error
        # It has come meanwhile.
        return unavailable(Reason.OVERLOADED, f"'{ref}' is just being published", retry_after=0.1)

    async def list_versions(self, adapter: AdapterName, request: PageRequest) -> Page[VersionRecord]:
        """The versions of an adapter, newest first; raises MeshError ADAPTER_NOT_FOUND."""

        def key(version: VersionRecord) -> Key:
            return (version.number,)

        pager = Pager(request, ["versions", str(adapter)], key, (int,))
        async with self._database.reading() as connection:
            adapter_id = await find_adapter(connection, adapter)
            query = SELECT_VERSIONS.where(versions.c.adapter_id == adapter_id)
            if pager.after is not None:
                query = query.where(versions.c.number < pager.after[0])
            rows = await connection.execute(query.order_by(versions.c.number.desc()).limit(pager.limit))
            return pager.page([version_record(row) for row in rows])


async def _insert(
    connection: AsyncConnection, version: VersionRecord, tensor_digest: str
) -> tuple[StoredVersion, int, int]:
    """The version, the adapter's row id and the version's."""
    adapter_id, number = await _next_number(connection, version.adapter)
    numbered = dataclasses.replace(version, number=number)
    position = await append_change(
        connection, ChangeKind.VERSION_PUBLISHED, numbered, numbered.create_time_us
    )
    row = {
        **version_values(numbered),
        "adapter_id": adapter_id,
        "tensor_digest": tensor_digest,
        "feed_position": position,
    }
    inserted = await connection.execute(insert(versions).values(row).returning(versions.c.id))
    version_id = inserted.scalar_one()
    tags = [{"version_id": version_id, "tag": tag} for tag in sorted(set(version.tags))]
    if tags:
        await connection.execute(insert(version_tags), tags)
    return StoredVersion(numbered, tensor_digest, position), adapter_id, int(version_id)


async def _next_number(connection: AsyncConnection, adapter: AdapterName) -> tuple[int, int]:
    """Counts the adapter's versions up by one; returns the adapter's row id and the new number."""
    same = (adapters.c.namespace == adapter.namespace) & (adapters.c.name == adapter.name)
    following = adapters.c.version_count + 1
    count = update(adapters).where(same).values(version_count=following, newest_number=following)
    counted = (await connection.execute(count.returning(adapters.c.id, adapters.c.version_count))).first()
    if counted is not None:
        return counted.id, counted.version_count
    row = {"namespace": adapter.namespace, "name": adapter.name, "version_count": 1, "newest_number": 1}
    added = await connection.execute(insert(adapters).values(row).returning(adapters.c.id))
    return int(added.scalar_one()), 1


def _check_base_model(base: BaseModelRecord) -> None:
    check_line("base_model.model_id", base.model_id, 200, required=True)
    check_line("base_model.architecture", base.architecture, 200)
    if len(base.config_json.encode()) > MAX_CONFIG_BYTES:
        raise invalid_field("base_model.config_json", f"has more than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(base.config_json)
    except (ValueError, RecursionError) as error:
        raise invalid_field("base_model.config_json", f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise invalid_field("base_model.config_json", "is not a JSON object")
    derived = BaseFacts.from_config(base.model_id, config, base.weights_digest)
    for name in ("architecture", "hidden_size", "num_layers", "vocab_size", "config_digest", "digest"):
        given, expected = getattr(base, name), getattr(derived, name)
        if given != expected:
            raise MeshError(
                Code.INVALID_ARGUMENT,
                Reason.DIGEST_MISMATCH if name.endswith("digest") else Reason.INVALID_FIELD,
                f"base_model.{name} is {given!r}, but config and weights give {expected!r}",
                metadata={"field": f"base_model.{name}", "name": base.model_id},
            )
