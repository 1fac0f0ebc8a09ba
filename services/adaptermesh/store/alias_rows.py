"""The rows of an alias: every change in its history, and a pointer to the one that holds now."""

import dataclasses

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.records import AliasRecord
from adaptermesh.store.rows import SELECT_ALIASES, alias_record
from adaptermesh.store.schema import alias_moves, aliases

MAX_ALIASES = 256
"""Of one adapter: all of them fit into one message."""


async def current(connection: AsyncConnection, adapter_id: int, alias: str) -> AliasRecord | None:
    """The alias as it is now, if there is one."""
    query = SELECT_ALIASES.where((alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == alias))
    row = (await connection.execute(query)).first()
    return None if row is None else alias_record(row)


async def aliases_of(
    connection: AsyncConnection, adapter_id: int, version_number: int, limit: int
) -> list[str]:
    """The aliases that point at a version now."""
    same = (alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.version_number == version_number)
    query = SELECT_ALIASES.where(same).order_by(alias_moves.c.alias).limit(limit)
    return [row.alias for row in await connection.execute(query)]


async def check_room(connection: AsyncConnection, adapter_id: int) -> None:
    """Raises MeshError if the adapter can't have one more alias."""
    query = select(func.count()).select_from(aliases).where(aliases.c.adapter_id == adapter_id)
    if (await connection.execute(query)).scalar_one() >= MAX_ALIASES:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.INVALID_FIELD,
            f"alias: the adapter has {MAX_ALIASES} aliases, the limit",
            metadata={"field": "alias"},
        )


async def earlier_version(connection: AsyncConnection, adapter_id: int, now: AliasRecord) -> int:
    """The version that the alias pointed to before this one; raises MeshError ALIAS_NO_PREVIOUS."""
    query = (
        select(alias_moves.c.version_number)
        .where((alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == now.alias))
        .where(alias_moves.c.version_number != now.version_number)
        .order_by(alias_moves.c.generation.desc())
        .limit(1)
    )
    found = (await connection.execute(query)).scalar()
    if found is None:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ALIAS_NO_PREVIOUS,
            f"alias '{now.ref}' has only ever pointed to v{now.version_number}",
            metadata={"name": now.ref, "generation": str(now.generation)},
        )
    return int(found)


async def last_generation(connection: AsyncConnection, adapter_id: int, alias: str) -> int:
    """The generation of the last entry in its history; 0 if it was never set."""
    query = select(func.max(alias_moves.c.generation)).where(
        (alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == alias)
    )
    return (await connection.execute(query)).scalar() or 0


async def write(connection: AsyncConnection, adapter_id: int, change: AliasRecord, *, known: bool) -> None:
    """Adds a change to the history and makes it the one that holds; `known` is that the alias is there."""
    await _append(connection, adapter_id, change)
    pointer = {"adapter_id": adapter_id, "alias": change.alias, "generation": change.generation}
    if known:
        same = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == change.alias)
        await connection.execute(update(aliases).where(same).values(generation=change.generation))
    else:
        await connection.execute(insert(aliases).values(pointer))


async def remove(connection: AsyncConnection, adapter_id: int, gone: AliasRecord) -> None:
    """Adds the removal to the history; then no change holds any more."""
    await _append(connection, adapter_id, gone)
    same = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == gone.alias)
    await connection.execute(delete(aliases).where(same))


async def _append(connection: AsyncConnection, adapter_id: int, change: AliasRecord) -> None:
    row = {**dataclasses.asdict(change), "action": change.action.value}
    for name in ("namespace", "name"):
        del row[name]
    await connection.execute(insert(alias_moves).values(adapter_id=adapter_id, **row))
