"""Aliases: compare-and-set, history, rollback. A rollback is a move like any other."""

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.refs import AdapterName, Ref, check_name
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import (
    MAX_ACTOR,
    MAX_COMMENT,
    check_generation,
    check_text,
    check_version_number,
)
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import AliasRecord, ChangeKind
from adaptermesh.store.resolution import find_adapter, find_usable
from adaptermesh.store.rows import SELECT_ALIASES, SELECT_MOVES, alias_record
from adaptermesh.store.schema import alias_moves, aliases

log = logging.getLogger(__name__)

MAX_ALIASES = 256
"""Of one adapter: all of them fit into one message."""


@dataclass(frozen=True, slots=True)
class AliasName:
    """`namespace/name@alias`."""

    adapter: AdapterName
    alias: str

    def __str__(self) -> str:
        return f"{self.adapter}@{self.alias}"


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """A wanted move: who, why, and on which state it rests.

    `expected_generation` is the one the alias has now, 0 if it must not exist yet, None for whatever it is.
    """

    alias: AliasName
    expected_generation: int | None = None
    actor: str = ""
    comment: str = ""


class Aliases:
    """The movable pointers to versions."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def point(self, request: MoveRequest, version_number: int) -> tuple[AliasRecord, int]:
        """Points an alias at a version; returns it and the feed position.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, VERSION_REVOKED; ALIAS_CONFLICT if it has
                moved since.
        """
        _check(request)
        check_version_number(version_number)

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await _current(connection, adapter_id, request.alias.alias)
            _compare(request, current)
            return await self._move(connection, request, current, adapter_id, version_number)

        return await self._write(work)

    async def roll_back(self, request: MoveRequest) -> tuple[AliasRecord, int]:
        """Points an alias at the version it pointed to before its last move to another version.

        Rolling back twice therefore ends where it began.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND, ALIAS_CONFLICT; FAILED_PRECONDITION
                (ALIAS_NO_PREVIOUS) if it has only ever pointed to one version, (VERSION_REVOKED) if that
                version is revoked.
        """
        _check(request)

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await _current(connection, adapter_id, request.alias.alias)
            if current is None:
                raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(request.alias))
            _compare(request, current)
            earlier = await _earlier_version(connection, adapter_id, current)
            return await self._move(connection, request, current, adapter_id, earlier)

        return await self._write(work)

    async def history(self, name: AliasName, request: PageRequest) -> Page[AliasRecord]:
        """Every move of an alias, newest first; raises MeshError ADAPTER_NOT_FOUND or ALIAS_NOT_FOUND."""
        check_name(name.alias, "alias")

        def key(move: AliasRecord) -> Key:
            return (move.generation,)

        pager = Pager(request, ["alias_history", str(name)], key, (int,))
        async with self._database.reading() as connection:
            adapter_id = await find_adapter(connection, name.adapter)
            if await _current(connection, adapter_id, name.alias) is None:
                raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(name))
            query = SELECT_MOVES.where(
                (alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == name.alias)
            )
            if pager.after is not None:
                query = query.where(alias_moves.c.generation < pager.after[0])
            query = query.order_by(alias_moves.c.generation.desc()).limit(pager.limit)
            return pager.page([alias_record(row) for row in await connection.execute(query)])

    async def _move(
        self,
        connection: AsyncConnection,
        request: MoveRequest,
        current: AliasRecord | None,
        adapter_id: int,
        version_number: int,
    ) -> tuple[AliasRecord, int]:
        adapter = request.alias.adapter
        target = await find_usable(connection, Ref(adapter, version=version_number))
        move = AliasRecord(
            namespace=adapter.namespace,
            name=adapter.name,
            alias=request.alias.alias,
            version_number=version_number,
            digest=target.record.digest,
            generation=1 if current is None else current.generation + 1,
            update_time_us=int(self._clock.wall() * 1e6),
            actor=request.actor,
            comment=request.comment,
        )
        row = dataclasses.asdict(move)
        for name in ("namespace", "name", "digest"):
            del row[name]
        await connection.execute(insert(alias_moves).values(adapter_id=adapter_id, **row))
        pointer = {"adapter_id": adapter_id, "alias": move.alias, "generation": move.generation}
        if current is None:
            await _check_room(connection, adapter_id)
            await connection.execute(insert(aliases).values(pointer))
        else:
            same = (aliases.c.adapter_id == adapter_id) & (aliases.c.alias == move.alias)
            await connection.execute(update(aliases).where(same).values(generation=move.generation))
        position = await append_change(connection, ChangeKind.ALIAS_SET, move, move.update_time_us)
        return move, position

    async def _write(
        self, work: Callable[[AsyncConnection], Awaitable[tuple[AliasRecord, int]]]
    ) -> tuple[AliasRecord, int]:
        move, position = await self._database.write(work)
        log.info(
            "alias moved",
            extra={
                "alias": f"{move.namespace}/{move.name}@{move.alias}",
                "version_number": move.version_number,
                "generation": move.generation,
                "feed_position": position,
            },
        )
        return move, position


async def _current(connection: AsyncConnection, adapter_id: int, alias: str) -> AliasRecord | None:
    query = SELECT_ALIASES.where((alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == alias))
    row = (await connection.execute(query)).first()
    return None if row is None else alias_record(row)


async def _check_room(connection: AsyncConnection, adapter_id: int) -> None:
    query = select(func.count()).select_from(aliases).where(aliases.c.adapter_id == adapter_id)
    if (await connection.execute(query)).scalar_one() >= MAX_ALIASES:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.INVALID_FIELD,
            f"alias: the adapter has {MAX_ALIASES} aliases, the limit",
            metadata={"field": "alias"},
        )


async def _earlier_version(connection: AsyncConnection, adapter_id: int, current: AliasRecord) -> int:
    query = (
        select(alias_moves.c.version_number)
        .where((alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == current.alias))
        .where(alias_moves.c.version_number != current.version_number)
        .order_by(alias_moves.c.generation.desc())
        .limit(1)
    )
    found = (await connection.execute(query)).scalar()
    if found is None:
        ref = f"{current.namespace}/{current.name}@{current.alias}"
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ALIAS_NO_PREVIOUS,
            f"alias '{ref}' has only ever pointed to v{current.version_number}",
            metadata={"name": ref, "generation": str(current.generation)},
        )
    return int(found)


def _check(request: MoveRequest) -> None:
    check_name(request.alias.alias, "alias")
    check_generation(request.expected_generation)
    check_text("actor", request.actor, MAX_ACTOR)
    check_text("comment", request.comment, MAX_COMMENT)


def _compare(request: MoveRequest, current: AliasRecord | None) -> None:
    generation = 0 if current is None else current.generation
    if request.expected_generation in (None, generation):
        return
    metadata = {"name": str(request.alias), "generation": str(generation)}
    if current is not None:
        metadata["version_number"] = str(current.version_number)
    raise MeshError(
        Code.ABORTED,
        Reason.ALIAS_CONFLICT,
        f"alias '{request.alias}' is at generation {generation}, not {request.expected_generation}",
        metadata=metadata,
    )
