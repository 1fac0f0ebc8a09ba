"""Whether a version should be used: active, deprecated or revoked, by compare-and-set."""

import dataclasses
import logging
from dataclasses import dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field
from adaptermesh.core.refs import AdapterName, Ref, parse_ref
from adaptermesh.core.version_state import VersionState
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
from adaptermesh.store.records import ChangeKind, DeletedVersion, VersionRecord, VersionStatus
from adaptermesh.store.resolution import find_adapter, find_deleted, find_version
from adaptermesh.store.rows import status_record
from adaptermesh.store.schema import status_changes, version_statuses, versions
from adaptermesh.store.usability import find_usable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """A wanted status: who, why, and on which state it rests.

    `replacement` is a ref, for a deprecation; `expected_generation` is the status' generation now, 0 if it
    was never set, None for whatever it is.
    """

    adapter: AdapterName
    version_number: int
    state: VersionState
    reason: str = ""
    replacement: str = ""
    expected_generation: int | None = None
    actor: str = ""

    @property
    def ref(self) -> Ref:
        return Ref(self.adapter, version=self.version_number)


class Statuses:
    """The statuses of versions."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def set(self, request: StatusRequest) -> tuple[VersionRecord, int]:
        """Sets a version's status; returns the version and the feed position.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND, also of the replacement; STATUS_CONFLICT if it
                was set since; VERSION_REVOKED for the replacement; INVALID_FIELD.
        """
        _check(request)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[VersionRecord, int]:
            version = (await find_version(connection, request.ref)).record
            _compare(request, version)
            await _check_replacement(connection, request, version)
            status = VersionStatus(
                state=request.state,
                reason=request.reason,
                replacement=request.replacement,
                generation=version.status.generation + 1,
                update_time_us=now_us,
                actor=request.actor,
            )
            await _save(connection, version, status)
            changed = dataclasses.replace(version, status=status)
            return changed, await append_change(connection, ChangeKind.VERSION_STATUS_SET, changed, now_us)

        changed, position = await self._database.write(work)
        log.info(
            "version status set",
            extra={
                "version": changed.ref,
                "digest": changed.digest,
                "state": changed.status.state.value,
                "generation": changed.status.generation,
                "feed_position": position,
            },
        )
        return changed, position

    async def history(
        self, adapter: AdapterName, version_number: int, request: PageRequest
    ) -> tuple[Page[VersionStatus], DeletedVersion | None]:
        """Every status that a version ever had, newest first, and what removed it, if something did.

        Raises:
            MeshError: ADAPTER_NOT_FOUND, VERSION_NOT_FOUND.
        """
        ref = Ref(adapter, version=check_version_number(version_number))

        def key(status: VersionStatus) -> Key:
            return (status.generation,)

        pager = Pager(request, ["status_history", str(ref)], key, (int,))
        async with self._database.reading() as connection:
            adapter_id = await find_adapter(connection, adapter)
            deleted = await find_deleted(connection, ref, adapter_id)
            if deleted is None:
                await find_version(connection, ref)
            query = select(status_changes).where(
                (status_changes.c.adapter_id == adapter_id) & (status_changes.c.number == version_number)
            )
            if pager.after is not None:
                query = query.where(status_changes.c.generation < pager.after[0])
            query = query.order_by(status_changes.c.generation.desc()).limit(pager.limit)
            rows = (await connection.execute(query)).all()
        return pager.page([status_record(row) for row in rows]), deleted


async def _save(connection: AsyncConnection, version: VersionRecord, status: VersionStatus) -> None:
    row = {**dataclasses.asdict(status), "state": status.state.value}
    same = versions.c.digest == version.digest
    found = (await connection.execute(select(versions.c.id, versions.c.adapter_id).where(same))).one()
    if version.status.generation:
        known = version_statuses.c.version_id == found.id
        await connection.execute(update(version_statuses).where(known).values(row))
    else:
        await connection.execute(insert(version_statuses).values(version_id=found.id, **row))
    change = {"adapter_id": found.adapter_id, "number": version.number, **row}
    await connection.execute(insert(status_changes).values(change))


def _check(request: StatusRequest) -> None:
    check_version_number(request.version_number)
    check_generation(request.expected_generation)
    check_text("actor", request.actor, MAX_ACTOR)
    revoked = request.state is VersionState.REVOKED
    check_text("reason", request.reason, MAX_COMMENT, required=revoked)
    if request.replacement and request.state is not VersionState.DEPRECATED:
        raise invalid_field("replacement", "only a deprecated version has one")


async def _check_replacement(
    connection: AsyncConnection, request: StatusRequest, version: VersionRecord
) -> None:
    if not request.replacement:
        return
    found = await find_usable(connection, parse_ref(request.replacement))
    if found.record.digest == version.digest:
        raise invalid_field("replacement", f"'{request.replacement}' is the version itself")


def _compare(request: StatusRequest, version: VersionRecord) -> None:
    generation = version.status.generation
    if request.expected_generation in (None, generation):
        return
    raise MeshError(
        Code.ABORTED,
        Reason.STATUS_CONFLICT,
        f"the status of '{version.ref}' is at generation {generation}, not {request.expected_generation}",
        metadata={
            "name": version.ref,
            "generation": str(generation),
            "state": version.status.state.value,
        },
    )
