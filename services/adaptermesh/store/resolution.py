"""What a ref means, inside a transaction that somebody else began."""

from sqlalchemy import ScalarSelect, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Reason, not_found
from adaptermesh.core.refs import AdapterName, Ref
from adaptermesh.store.rows import SELECT_VERSIONS, StoredVersion, stored_version
from adaptermesh.store.schema import adapters, alias_moves, aliases, versions


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
        MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND or ALIAS_NOT_FOUND.
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
        raise not_found(Reason.VERSION_NOT_FOUND, "version", str(ref))
    return stored_version(row)


async def find_digest(connection: AsyncConnection, digest: str) -> StoredVersion | None:
    """The version with a digest, if there is one."""
    row = (await connection.execute(SELECT_VERSIONS.where(versions.c.digest == digest))).first()
    return None if row is None else stored_version(row)


def _target(adapter_id: int, alias: str) -> ScalarSelect[int]:
    """The number of the version that an alias points to."""
    same_move = (aliases.c.alias == alias_moves.c.alias) & (aliases.c.generation == alias_moves.c.generation)
    return (
        select(alias_moves.c.version_number)
        .join(aliases, same_move & (aliases.c.adapter_id == alias_moves.c.adapter_id))
        .where((aliases.c.adapter_id == adapter_id) & (aliases.c.alias == alias))
        .scalar_subquery()
    )
