"""Decides what a caller may do: its key's roles where a namespace is its tenant's, else what is granted.

What a caller may not even see is answered as if it weren't there.
"""

from collections.abc import Iterable

from sqlalchemy import bindparam, select

from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.core.refs import AdapterName
from adaptermesh.core.roles import MESH_TENANT, Permission
from adaptermesh.store.access.caller import Caller, current_caller
from adaptermesh.store.access.quotas import check_quota, owner_of
from adaptermesh.store.access.records import Usage
from adaptermesh.store.access.rows import grant_record
from adaptermesh.store.access.standing import Standing, check_allowed, check_permission, denied
from adaptermesh.store.database import Database
from adaptermesh.store.schema import grants, namespaces


class Authority:
    """Asks the database for each decision: a grant or a namespace that has changed counts at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Asked for with nearly every call: the owner with each grant to the tenant or to everybody.
        given = (grants.c.namespace == namespaces.c.name) & (
            (grants.c.grantee == bindparam("tenant")) | (grants.c.grantee == MESH_TENANT)
        )
        columns = (grants.c.name, grants.c.grantee, grants.c.roles, grants.c.update_time_us, grants.c.actor)
        standing = select(namespaces.c.tenant, namespaces.c.name.label("namespace"), *columns)
        named = namespaces.c.name == bindparam("namespace")
        self._standings = database.prepare(standing.outerjoin(grants, given).where(named))

    def unrestricted(self, permission: Permission) -> bool:
        """Whether the caller may do it everywhere."""
        caller = current_caller.get()
        return caller.sees_everything and permission in caller.permissions

    async def require(self, permission: Permission, adapter: AdapterName) -> None:
        """Returns if the caller may do it with an adapter.

        Raises:
            MeshError: ADAPTER_NOT_FOUND if it may not even see it; PERMISSION_DENIED.
        """
        if self.unrestricted(permission):
            return
        standing = await self._standing(current_caller.get(), adapter.namespace)
        check_permission(permission, standing, adapter)

    async def require_version(self, permission: Permission, adapter: AdapterName, digest: str) -> None:
        """As `require`, where a version was asked for by its digest: only who may see it is told its name."""
        try:
            await self.require(permission, adapter)
        except MeshError as error:
            if error.code is Code.NOT_FOUND:
                raise not_found(Reason.VERSION_NOT_FOUND, "version", digest) from None
            raise

    async def require_namespace(self, permission: Permission, namespace: str) -> None:
        """Returns if the caller may do it in a namespace; to read, one adapter that it may see is enough.

        Raises:
            MeshError: NAMESPACE_NOT_FOUND if it may not see anything there; PERMISSION_DENIED.
        """
        if self.unrestricted(permission):
            return
        caller = current_caller.get()
        standing = await self._standing(caller, namespace)
        allowed = standing.permissions(caller)
        if caller.reaches(namespace) and any(grant.is_to(caller.tenant) for grant in standing.grants):
            allowed |= {Permission.READ}
        missing = not_found(Reason.NAMESPACE_NOT_FOUND, "namespace", namespace[:80])
        check_allowed(permission, allowed, f"namespace '{namespace}'", missing)

    async def check_quota(self, namespace: str, size_bytes: int) -> None:
        """Raises MeshError QUOTA_EXCEEDED if one more version, at least this large, is too much."""
        caller = current_caller.get()
        async with self._database.reading() as connection:
            tenant = await owner_of(connection, namespace, caller)
            await check_quota(connection, tenant, Usage(size_bytes, 1))

    def require_tenant(self, permission: Permission, tenant: str, namespaces: Iterable[str] = ()) -> None:
        """Returns if the caller may do it in all of a tenant, or in these namespaces of it.

        Raises:
            MeshError: PERMISSION_DENIED.
        """
        caller = current_caller.get()
        mine = caller.is_operator or caller.tenant == tenant
        wanted = tuple(namespaces)
        if caller.namespaces and not (wanted and all(map(caller.reaches, wanted))):
            raise denied(permission, f"tenant '{tenant}' outside {', '.join(caller.namespaces)}")
        if not mine or permission not in caller.permissions:
            raise denied(permission, f"tenant '{tenant}'")

    def require_operator(self, permission: Permission) -> None:
        """Returns if the caller may do it in the whole mesh; raises MeshError PERMISSION_DENIED."""
        if not self.unrestricted(permission):
            raise denied(permission, "the whole mesh")

    def require_anywhere(self, permission: Permission) -> None:
        """Returns if the caller may do it somewhere; raises MeshError PERMISSION_DENIED."""
        if permission not in current_caller.get().permissions:
            raise denied(permission, "anything")

    async def _standing(self, caller: Caller, namespace: str) -> Standing:
        rows = await self._database.fetch(self._standings, namespace=namespace, tenant=caller.tenant)
        owner = rows[0].tenant if rows else None
        return Standing(namespace, owner, tuple(grant_record(row) for row in rows if row.roles is not None))
