"""Grants: what tenants may do in namespaces of others."""

import logging

from sqlalchemy import ColumnElement, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.core.refs import check_name
from adaptermesh.core.roles import MESH_TENANT, Role
from adaptermesh.store.access.records import GrantRecord
from adaptermesh.store.access.rows import grant_record
from adaptermesh.store.access.tenants import check_tenant
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import MAX_ACTOR, check_text
from adaptermesh.store.pages import Key, Page, Pager, PageRequest
from adaptermesh.store.records import ChangeKind
from adaptermesh.store.schema import grants, namespaces

log = logging.getLogger(__name__)

MAX_GRANTS = 1000


class Grants:
    """The grants of all namespaces."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def set(
        self, namespace: str, name: str, grantee: str, roles: tuple[Role, ...], actor: str = ""
    ) -> tuple[GrantRecord, int]:
        """Sets or replaces a grant; returns it and the feed position.

        Args:
            namespace: where.
            name: the adapter; empty for all of the namespace.
            grantee: the tenant, or "*" for everybody.
            roles: what is allowed.
            actor: who does it.

        Raises:
            MeshError: TENANT_NOT_FOUND; NAMESPACE_NOT_FOUND; FAILED_PRECONDITION for one grant too many.
        """
        _check_place(namespace, name, grantee)
        check_text("actor", actor, MAX_ACTOR)
        if not roles:
            raise invalid_field("grant.roles", "must be at least one")
        now_us = int(self._clock.wall() * 1e6)
        grant = GrantRecord(namespace, name, grantee, tuple(sorted(set(roles))), now_us, actor)

        async def work(connection: AsyncConnection) -> int:
            if grantee != MESH_TENANT:
                await check_tenant(connection, grantee)
            await _check_room(connection, grant)
            await connection.execute(delete(grants).where(_same(namespace, name, grantee)))
            row = {
                "namespace": namespace,
                "name": name,
                "grantee": grantee,
                "roles": [role.value for role in grant.roles],
                "update_time_us": now_us,
                "actor": actor,
            }
            await connection.execute(insert(grants).values(row))
            return await append_change(connection, ChangeKind.GRANT_SET, grant, now_us)

        position = await self._database.write(work)
        log.info("grant set", extra={**_fields(grant), "feed_position": position})
        return grant, position

    async def delete(self, namespace: str, name: str, grantee: str, actor: str = "") -> int:
        """Takes a grant back; returns the feed position. Raises MeshError GRANT_NOT_FOUND."""
        _check_place(namespace, name, grantee)
        check_text("actor", actor, MAX_ACTOR)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[GrantRecord, int]:
            same = _same(namespace, name, grantee)
            row = (await connection.execute(select(grants).where(same))).first()
            if row is None:
                what = f"{namespace}/{name or '*'} to {grantee}"
                raise not_found(Reason.GRANT_NOT_FOUND, "grant", what)
            known = grant_record(row)
            gone = GrantRecord(namespace, name, grantee, known.roles, now_us, actor)
            await connection.execute(delete(grants).where(same))
            return gone, await append_change(connection, ChangeKind.GRANT_DELETED, gone, now_us)

        gone, position = await self._database.write(work)
        log.info("grant deleted", extra={**_fields(gone), "feed_position": position})
        return position

    async def list(self, namespace: str, grantee: str, request: PageRequest) -> Page[GrantRecord]:
        """The grants of a namespace, or those to a tenant or to everybody."""
        if bool(namespace) == bool(grantee):
            raise invalid_field("namespace", "exactly one of namespace and grantee must be set")

        def key(grant: GrantRecord) -> Key:
            return grant.namespace, grant.name, grant.grantee

        pager = Pager(request, ["grants", namespace, grantee], key, (str, str, str))
        place = (grants.c.namespace, grants.c.name, grants.c.grantee)
        column, value = (grants.c.namespace, namespace) if namespace else (grants.c.grantee, grantee)
        statement = select(grants).where(column == value).order_by(*place).limit(pager.limit)
        if pager.after is not None:
            last_namespace, last_name, last_grantee = pager.after
            later = (grants.c.name == last_name) & (grants.c.grantee > last_grantee)
            later = (grants.c.namespace == last_namespace) & ((grants.c.name > last_name) | later)
            statement = statement.where((grants.c.namespace > last_namespace) | later)
        async with self._database.reading() as connection:
            rows = (await connection.execute(statement)).all()
        return pager.page(list(map(grant_record, rows)))


def _same(namespace: str, name: str, grantee: str) -> ColumnElement[bool]:
    return (grants.c.namespace == namespace) & (grants.c.name == name) & (grants.c.grantee == grantee)


def _check_place(namespace: str, name: str, grantee: str) -> None:
    check_name(namespace, "namespace")
    if name:
        check_name(name, "name")
    if grantee != MESH_TENANT:
        check_name(grantee, "grantee")


async def _check_room(connection: AsyncConnection, grant: GrantRecord) -> None:
    known = select(namespaces.c.name).where(namespaces.c.name == grant.namespace)
    if (await connection.execute(known)).first() is None:
        raise not_found(Reason.NAMESPACE_NOT_FOUND, "namespace", grant.namespace)
    others = ~_same(grant.namespace, grant.name, grant.grantee)
    count = select(func.count()).select_from(grants).where(grants.c.namespace == grant.namespace, others)
    if (await connection.execute(count)).scalar_one() >= MAX_GRANTS:
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.INVALID_FIELD,
            f"grant: namespace '{grant.namespace}' has {MAX_GRANTS} grants, the limit",
            metadata={"field": "grant"},
        )


def _fields(grant: GrantRecord) -> dict[str, str]:
    return {
        "namespace": grant.namespace,
        "adapter": grant.name,
        "grantee": grant.grantee,
        "roles": ",".join(grant.roles),
    }
