"""What a ref means, inside a transaction that somebody else began."""

import datetime
from typing import Any

from sqlalchemy import ScalarSelect, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import MeshError, Reason, invalid_field, not_found, version_deleted
from adaptermesh.core.refs import AdapterName, Ref
from adaptermesh.store.access.visibility import visible
from adaptermesh.store.records import DeletedVersion
from adaptermesh.store.rows import (
    SELECT_DELETED,
    SELECT_VERSIONS,
    StoredVersion,
    deleted_version,
    stored_version,
)
from adaptermesh.store.schema import adapters, alias_moves, aliases, deleted_versions, versions


async def find_adapter(connection: AsyncConnection, adapter: AdapterName) -> int:
    """The adapter's row id; raises MeshError ADAPTER_NOT_FOUND."""
    same = (adapters.c.namespace == adapter.namespace) & (adapters.c.name == adapter.name)
    found = (await connection.execute(select(adapters.c.id).where(same))).scalar()
    if found is None:
        raise not_found(Reason.ADAPTER_NOT_FOUND, "adapter", str(adapter))
    return int(found)


async def find_version(connection: AsyncConnection, ref: Ref) -> StoredVersion:
    """The version a ref means now, whatever its status.

    Raises:
        MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, VERSION_DELETED or ALIAS_NOT_FOUND.
    """
    adapter_id = await find_adapter(connection, ref.adapter)
    query = SELECT_VERSIONS.where(versions.c.adapter_id == adapter_id)
    if ref.alias is not None:
        row = (
            await connection.execute(query.where(versions.c.number == _target(adapter_id, ref.alias)))
        ).first()
        if row is None:
            raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(ref))
        return stored_version(row)
    if ref.digest is not None:
        query = query.where(versions.c.digest == ref.digest)
    else:
        query = query.where(versions.c.number == ref.version)
    row = (await connection.execute(query)).first()
    if row is None:
        raise gone(str(ref), await find_deleted(connection, ref, adapter_id))
    return stored_version(row)


async def get_digest(connection: AsyncConnection, digest: str) -> StoredVersion:
    """The version with a digest; raises MeshError VERSION_NOT_FOUND, VERSION_DELETED or INVALID_FIELD."""
    if not is_digest(digest):
        raise invalid_field("digest", "must be sha256:<64 lower-case hex digits>")
    found = await find_digest(connection, digest)
    if found is None:
        query = SELECT_DELETED.where(deleted_versions.c.digest == digest)
        if (seen := visible()) is not None:
            # A digest alone says nothing of whether its adapter may be seen.
            query = query.where(seen)
        raise gone(digest, await _last_deleted(connection, query))
    return found


async def find_digest(connection: AsyncConnection, digest: str) -> StoredVersion | None:
    """The version with a digest, if there is one."""
    row = (await connection.execute(SELECT_VERSIONS.where(versions.c.digest == digest))).first()
    return None if row is None else stored_version(row)


async def find_deleted(connection: AsyncConnection, ref: Ref, adapter_id: int) -> DeletedVersion | None:
    """What was removed under a ref's number or digest, if something was."""
    query = SELECT_DELETED.where(deleted_versions.c.adapter_id == adapter_id)
    if ref.digest is not None:
        return await _last_deleted(connection, query.where(deleted_versions.c.digest == ref.digest))
    return await _last_deleted(connection, query.where(deleted_versions.c.number == ref.version))


def gone(ref: str, deleted: DeletedVersion | None) -> MeshError:
    """The refusal of a version that isn't there: whether it ever was."""
    if deleted is None:
        return not_found(Reason.VERSION_NOT_FOUND, "version", ref)
    time = datetime.datetime.fromtimestamp(deleted.delete_time_us / 1e6, datetime.UTC)
    return version_deleted(
        ref,
        deleted.ref,
        deleted.digest,
        time=time.isoformat(timespec="seconds"),
        actor=deleted.actor,
        why=deleted.reason,
    )


async def _last_deleted(connection: AsyncConnection, query: Select[Any]) -> DeletedVersion | None:
    row = (await connection.execute(query.order_by(deleted_versions.c.number.desc()).limit(1))).first()
    return None if row is None else deleted_version(row)


def _target(adapter_id: int, alias: str) -> ScalarSelect[int]:
    """The number of the version that an alias points to."""
    same_move = (aliases.c.alias == alias_moves.c.alias) & (aliases.c.generation == alias_moves.c.generation)
    return (
        select(alias_moves.c.version_number)
        .join(aliases, same_move & (aliases.c.adapter_id == alias_moves.c.adapter_id))
        .where((aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias))
        .scalar_subquery()
    )
