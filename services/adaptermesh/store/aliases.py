"""Aliases: compare-and-set, history, rollback, protection. A rollback is a move like any other."""

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.refs import AdapterName, Ref, check_name
from adaptermesh.store import alias_rows
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
from adaptermesh.store.resolution import find_adapter
from adaptermesh.store.routes import routes_to
from adaptermesh.store.rows import SELECT_MOVES, alias_record
from adaptermesh.store.schema import alias_moves
from adaptermesh.store.usability import find_usable

log = logging.getLogger(__name__)


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
    `acknowledge_protection` lets it move although it is protected.
    """

    alias: AliasName
    expected_generation: int | None = None
    actor: str = ""
    comment: str = ""
    acknowledge_protection: bool = False


class Aliases:
    """The movable pointers to versions."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def point(self, request: MoveRequest, version_number: int) -> tuple[AliasRecord, int]:
        """Points an alias at a version; returns it and the feed position.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, VERSION_REVOKED, VERSION_UNSIGNED,
                ALIAS_PROTECTED;
                ALIAS_CONFLICT if it has changed since.
        """
        _check(request)
        check_version_number(version_number)

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await alias_rows.current(connection, adapter_id, request.alias.alias)
            _compare(request, current)
            _check_protection(request, current)
            return await self._move(connection, request, current, adapter_id, version_number)

        return await self._write(work)

    async def roll_back(self, request: MoveRequest) -> tuple[AliasRecord, int]:
        """Points an alias at the version it pointed to before its last move to another version.

        Rolling back twice therefore ends where it began.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND, ALIAS_CONFLICT; FAILED_PRECONDITION
                (ALIAS_PROTECTED); (ALIAS_NO_PREVIOUS) if it has only ever pointed to one version;
                (VERSION_REVOKED, VERSION_UNSIGNED) if the earlier one must not be used.
        """
        _check(request)

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await _existing(connection, adapter_id, request)
            _check_protection(request, current)
            earlier = await alias_rows.earlier_version(connection, adapter_id, current)
            return await self._move(connection, request, current, adapter_id, earlier)

        return await self._write(work)

    async def protect(self, request: MoveRequest, *, protected: bool) -> tuple[AliasRecord, int]:
        """Protects an alias or takes its protection away; returns it and the feed position.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND, ALIAS_CONFLICT.
        """
        _check(request)
        action = AliasAction.PROTECTED if protected else AliasAction.UNPROTECTED

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await _existing(connection, adapter_id, request)
            change = self._change(request, current, action, protected=protected)
            await alias_rows.write(connection, adapter_id, change, known=True)
            return change, await append_change(
                connection, ChangeKind.ALIAS_SET, change, change.update_time_us
            )

        return await self._write(work)

    async def delete(self, request: MoveRequest) -> tuple[AliasRecord, int]:
        """Removes an alias; returns the last entry of its history, which stays, and the feed position.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, ALIAS_NOT_FOUND, ALIAS_CONFLICT; FAILED_PRECONDITION
                (ALIAS_PROTECTED), or (ALIAS_IN_USE) if a route sends requests there.
        """
        _check(request)

        async def work(connection: AsyncConnection) -> tuple[AliasRecord, int]:
            adapter_id = await find_adapter(connection, request.alias.adapter)
            current = await _existing(connection, adapter_id, request)
            _check_protection(request, current)
            await _check_routes(connection, request.alias)
            gone = self._change(request, current, AliasAction.DELETED, protected=current.protected)
            await alias_rows.remove(connection, adapter_id, gone)
            return gone, await append_change(connection, ChangeKind.ALIAS_DELETED, gone, gone.update_time_us)

        return await self._write(work)

    async def history(self, name: AliasName, request: PageRequest) -> Page[AliasRecord]:
        """Every change of an alias, newest first, also of one that is removed.

        Raises:
            MeshError: ADAPTER_NOT_FOUND; ALIAS_NOT_FOUND for one that was never set.
        """
        check_name(name.alias, "alias")

        def key(move: AliasRecord) -> Key:
            return (move.generation,)

        pager = Pager(request, ["alias_history", str(name)], key, (int,))
        async with self._database.reading() as connection:
            adapter_id = await find_adapter(connection, name.adapter)
            if not await alias_rows.last_generation(connection, adapter_id, name.alias):
                raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(name))
            query = SELECT_MOVES.where(
                (alias_moves.c.adapter_id == adapter_id) & (alias_moves.c.alias == name.alias)
            )
            if pager.after is not None:
                query = query.where(alias_moves.c.generation < pager.after[0])
            query = query.order_by(alias_moves.c.generation.desc()).limit(pager.limit)
            return pager.page([alias_record(row) for row in await connection.execute(query)])

    def _change(
        self, request: MoveRequest, current: AliasRecord, action: AliasAction, *, protected: bool
    ) -> AliasRecord:
        """The next entry of the history of an alias that stays where it points."""
        return dataclasses.replace(
            current,
            generation=current.generation + 1,
            update_time_us=int(self._clock.wall() * 1e6),
            actor=request.actor,
            comment=request.comment,
            protected=protected,
            action=action,
        )

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
            generation=1 + await alias_rows.last_generation(connection, adapter_id, request.alias.alias),
            update_time_us=int(self._clock.wall() * 1e6),
            actor=request.actor,
            comment=request.comment,
            protected=current is not None and current.protected,
        )
        if current is None:
            await alias_rows.check_room(connection, adapter_id)
        await alias_rows.write(connection, adapter_id, move, known=current is not None)
        position = await append_change(connection, ChangeKind.ALIAS_SET, move, move.update_time_us)
        return move, position

    async def _write(
        self, work: Callable[[AsyncConnection], Awaitable[tuple[AliasRecord, int]]]
    ) -> tuple[AliasRecord, int]:
        move, position = await self._database.write(work)
        log.info(
            "alias changed",
            extra={
                "alias": move.ref,
                "action": move.action.value,
                "version_number": move.version_number,
                "generation": move.generation,
                "feed_position": position,
            },
        )
        return move, position


async def _existing(connection: AsyncConnection, adapter_id: int, request: MoveRequest) -> AliasRecord:
    """The alias as it is now, and as the caller expects it."""
    current = await alias_rows.current(connection, adapter_id, request.alias.alias)
    if current is None:
        raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(request.alias))
    _compare(request, current)
    return current


def _check_protection(request: MoveRequest, current: AliasRecord | None) -> None:
    if current is None or not current.protected or request.acknowledge_protection:
        return
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.ALIAS_PROTECTED,
        f"alias '{current.ref}' is protected: acknowledge that, or take the protection away first",
        metadata={"name": current.ref, "generation": str(current.generation)},
    )


async def _check_routes(connection: AsyncConnection, alias: AliasName) -> None:
    found = await routes_to(connection, Ref(alias.adapter, alias=alias.alias))
    if found:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.ALIAS_IN_USE,
            f"alias '{alias}' can't be removed: routes send requests there: {', '.join(found[:10])}",
            metadata={"name": str(alias), "routes": ", ".join(found[:10])},
        )


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
