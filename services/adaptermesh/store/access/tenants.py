"""Tenants, the namespaces that belong to them, and how much they use."""

import dataclasses
import logging
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.core.refs import check_name
from adaptermesh.store.access.caller import Caller
from adaptermesh.store.access.records import NamespaceRecord, Quotas, TenantRecord, Usage
from adaptermesh.store.access.rows import grant_record, tenant_record
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import MAX_ACTOR, MAX_INT64, check_generation, check_text
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import ChangeKind
from adaptermesh.store.rows import policy_record
from adaptermesh.store.schema import grants, namespace_policies, namespaces, tenants

log = logging.getLogger(__name__)


class Tenants:
    """The tenants and whose each namespace is."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def set(
        self, name: str, quotas: Quotas, expected_generation: int | None = None, actor: str = ""
    ) -> tuple[TenantRecord, int]:
        """Makes a tenant known or changes its quotas; returns it and the feed position.

        Raises:
            MeshError: TENANT_CONFLICT if it has changed since.
        """
        check_name(name, "tenant.name")
        check_generation(expected_generation)
        check_text("actor", actor, MAX_ACTOR)
        for field, value in dataclasses.asdict(quotas).items():
            if not 0 <= value <= MAX_INT64:
                raise invalid_field(f"tenant.{field}", "must not be negative")
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[TenantRecord, int]:
            known = await _find(connection, name)
            generation = known.generation if known else 0
            if expected_generation not in (None, generation):
                raise _conflict(name, generation, expected_generation)
            changed = TenantRecord(name, quotas, generation + 1, now_us, actor)
            row = {**dataclasses.asdict(changed), **dataclasses.asdict(quotas)}
            del row["quotas"]
            if known is None:
                await connection.execute(insert(tenants).values(row))
            else:
                await connection.execute(update(tenants).where(tenants.c.name == name).values(row))
            return changed, await append_change(connection, ChangeKind.TENANT_SET, changed, now_us)

        changed, position = await self._database.write(work)
        log.info(
            "tenant set", extra={"tenant": name, "feed_position": position, **dataclasses.asdict(quotas)}
        )
        return changed, position

    async def list(self, caller: Caller, request: PageRequest) -> Page[tuple[TenantRecord, Usage]]:
        """Tenants by name, with what they use: for operators all of them, for others their own."""

        def key(item: tuple[TenantRecord, Usage]) -> Key:
            return (item[0].name,)

        pager = Pager(request, ["tenants", caller.tenant], key, (str,))
        used_bytes, used_versions = func.sum(namespaces.c.used_bytes), func.sum(namespaces.c.used_versions)
        statement = (
            select(tenants, used_bytes.label("used_bytes"), used_versions.label("used_versions"))
            .outerjoin(namespaces, namespaces.c.tenant == tenants.c.name)
            .group_by(tenants.c.name)
            .order_by(tenants.c.name)
            .limit(pager.limit)
        )
        if not caller.sees_everything:
            statement = statement.where(tenants.c.name == caller.tenant)
        if pager.after is not None:
            statement = statement.where(tenants.c.name > pager.after[0])
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
        return pager.page([(tenant_record(row), _usage(row)) for row in rows])

    async def give_namespace(self, name: str, tenant: str, actor: str = "") -> tuple[NamespaceRecord, int]:
        """Gives a namespace to a tenant; returns it and the feed position.

        What the tenant before had granted ends with that, and so does the trust in its signing keys.

        Raises:
            MeshError: TENANT_NOT_FOUND.
        """
        check_name(name, "name")
        check_name(tenant, "tenant")
        check_text("actor", actor, MAX_ACTOR)
        now_us = int(self._clock.wall() * 1e6)
        given = NamespaceRecord(name, tenant, actor)

        async def work(connection: AsyncConnection) -> int:
            await check_tenant(connection, tenant)
            same = namespaces.c.name == name
            owner = (await connection.execute(select(namespaces.c.tenant).where(same))).scalar()
            if owner is None:
                row = {"name": name, "tenant": tenant, "used_bytes": 0, "used_versions": 0}
                await connection.execute(insert(namespaces).values(row))
            elif owner != tenant:
                await connection.execute(update(namespaces).where(same).values(tenant=tenant))
                await _end_trust(connection, name, now_us, actor)
            return await append_change(connection, ChangeKind.NAMESPACE_SET, given, now_us)

        position = await self._database.write(work)
        log.info("namespace set", extra={"namespace": name, "tenant": tenant, "feed_position": position})
        return given, position

    async def list_namespaces(
        self, tenant: str, caller: Caller, request: PageRequest
    ) -> Page[tuple[NamespaceRecord, Usage]]:
        """Namespaces by name, with what they hold: for operators all, for others their tenant's."""
        if tenant:
            check_name(tenant, "tenant")

        def key(item: tuple[NamespaceRecord, Usage]) -> Key:
            return (item[0].name,)

        pager = Pager(request, ["namespaces", tenant, caller.tenant, *caller.namespaces], key, (str,))
        statement = select(namespaces).order_by(namespaces.c.name).limit(pager.limit)
        if tenant:
            statement = statement.where(namespaces.c.tenant == tenant)
        if not caller.is_operator:
            statement = statement.where(namespaces.c.tenant == caller.tenant)
        if caller.namespaces:
            statement = statement.where(namespaces.c.name.in_(caller.namespaces))
        if pager.after is not None:
            statement = statement.where(namespaces.c.name > pager.after[0])
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
        return pager.page([(NamespaceRecord(row.name, row.tenant), _usage(row)) for row in rows])


async def _end_trust(connection: AsyncConnection, namespace: str, now_us: int, actor: str) -> None:
    """Takes back every grant and every signing key of a namespace that changes hands."""
    of_it = grants.c.namespace == namespace
    for row in (await connection.execute(select(grants).where(of_it))).all():
        gone = dataclasses.replace(grant_record(row), update_time_us=now_us, actor=actor)
        await append_change(connection, ChangeKind.GRANT_DELETED, gone, now_us)
    await connection.execute(delete(grants).where(of_it))
    asked = namespace_policies.c.namespace == namespace
    found = (await connection.execute(select(namespace_policies).where(asked))).first()
    if found is not None and found.keys:
        known = policy_record(found)
        policy = dataclasses.replace(
            known, keys=(), generation=known.generation + 1, update_time_us=now_us, actor=actor
        )
        values = {"keys": [], "generation": policy.generation, "update_time_us": now_us, "actor": actor}
        await connection.execute(update(namespace_policies).where(asked).values(values))
        await append_change(connection, ChangeKind.NAMESPACE_POLICY_SET, policy, now_us)


async def check_tenant(connection: AsyncConnection, tenant: str) -> None:
    """Raises MeshError TENANT_NOT_FOUND unless it is known."""
    if await _find(connection, tenant) is None:
        raise not_found(Reason.TENANT_NOT_FOUND, "tenant", tenant)


def _usage(row: Row[Any]) -> Usage:
    # PostgreSQL's sums are decimals, those of nothing are null.
    return Usage(int(row.used_bytes or 0), int(row.used_versions or 0))


async def _find(connection: AsyncConnection, name: str) -> TenantRecord | None:
    row = (await connection.execute(select(tenants).where(tenants.c.name == name))).first()
    return None if row is None else tenant_record(row)


def _conflict(name: str, generation: int, expected: int | None) -> MeshError:
    return MeshError(
        Code.ABORTED,
        Reason.TENANT_CONFLICT,
        f"tenant '{name}' is at generation {generation}, not {expected}",
        metadata={"name": name, "generation": str(generation)},
    )
