"""What a tenant uses, counted with every publication, and held against its quotas."""

from collections.abc import Iterable

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.roles import DEFAULT_TENANT, Permission
from adaptermesh.store.access.caller import Caller, current_caller
from adaptermesh.store.access.records import NamespaceRecord, Quotas, Usage
from adaptermesh.store.access.rows import grant_record, tenant_record
from adaptermesh.store.access.standing import Standing, check_permission
from adaptermesh.store.feed import append_change
from adaptermesh.store.records import ChangeKind, VersionRecord
from adaptermesh.store.schema import grants, namespaces, tenants

# SQLite takes a bounded number of parameters in one statement.
_NAMES_AT_ONCE = 500


def bytes_of(version: VersionRecord) -> int:
    """What a version counts: as uploaded and as served together."""
    return version.size_bytes + sum(file.size_bytes for file in version.source_files)


async def count_in(connection: AsyncConnection, version: VersionRecord) -> None:
    """Counts a version that is being published; a namespace that nobody has becomes the caller's tenant's.

    Raises:
        MeshError: QUOTA_EXCEEDED if that is more than the tenant may have; PERMISSION_DENIED or
            ADAPTER_NOT_FOUND if the namespace has become another's while the upload was under way.
    """
    caller = current_caller.get()
    await _check_publisher(connection, version, caller)
    tenant = await _owner(connection, version, caller)
    more = Usage(bytes_of(version), 1)
    await check_quota(connection, tenant, more)
    await _add(connection, version.namespace, more)


async def count_out(connection: AsyncConnection, version: VersionRecord) -> None:
    """Counts a version that is being removed."""
    await _add(connection, version.namespace, Usage(-bytes_of(version), -1))


async def check_quota(connection: AsyncConnection, tenant: str, more: Usage) -> None:
    """Raises MeshError QUOTA_EXCEEDED if a tenant may not have that much more."""
    row = (await connection.execute(select(tenants).where(tenants.c.name == tenant))).one()
    quotas = tenant_record(row).quotas
    if not (quotas.max_bytes or quotas.max_versions):
        return
    used = select(func.sum(namespaces.c.used_bytes), func.sum(namespaces.c.used_versions))
    row = (await connection.execute(used.where(namespaces.c.tenant == tenant))).one()
    _compare(tenant, quotas, Usage(int(row[0] or 0), int(row[1] or 0)), more)


async def owners_of(connection: AsyncConnection, names: Iterable[str]) -> dict[str, str]:
    """Whose each of some namespaces is."""
    wanted = sorted(set(names))
    found = dict.fromkeys(wanted, DEFAULT_TENANT)
    for start in range(0, len(wanted), _NAMES_AT_ONCE):
        some = wanted[start : start + _NAMES_AT_ONCE]
        query = select(namespaces.c.name, namespaces.c.tenant).where(namespaces.c.name.in_(some))
        found |= {row.name: row.tenant for row in await connection.execute(query)}
    return found


async def owner_of(connection: AsyncConnection, namespace: str, caller: Caller) -> str:
    """Whose a namespace is, or would be if the caller published there."""
    query = select(namespaces.c.tenant).where(namespaces.c.name == namespace)
    found = (await connection.execute(query)).scalar()
    return found or (DEFAULT_TENANT if caller.is_operator else caller.tenant)


async def _check_publisher(connection: AsyncConnection, version: VersionRecord, caller: Caller) -> None:
    """Again what was decided by the upload's header: since then its bytes may have taken their time."""
    if caller.sees_everything and Permission.PUBLISH in caller.permissions:
        return
    owner = await connection.execute(
        select(namespaces.c.tenant).where(namespaces.c.name == version.namespace)
    )
    rows = (await connection.execute(select(grants).where(grants.c.namespace == version.namespace))).all()
    standing = Standing(version.namespace, owner.scalar(), tuple(map(grant_record, rows)))
    check_permission(Permission.PUBLISH, standing, version.adapter)


async def _owner(connection: AsyncConnection, version: VersionRecord, caller: Caller) -> str:
    query = select(namespaces.c.name).where(namespaces.c.name == version.namespace)
    known = (await connection.execute(query)).first() is not None
    tenant = await owner_of(connection, version.namespace, caller)
    if not known:
        row = {"name": version.namespace, "tenant": tenant, "used_bytes": 0, "used_versions": 0}
        await connection.execute(insert(namespaces).values(row))
        if tenant != DEFAULT_TENANT:
            # What nothing is said of is the default tenant's for whoever follows the feed.
            claimed = NamespaceRecord(version.namespace, tenant)
            await append_change(connection, ChangeKind.NAMESPACE_SET, claimed, version.create_time_us)
    return tenant


async def _add(connection: AsyncConnection, namespace: str, more: Usage) -> None:
    await connection.execute(
        update(namespaces)
        .where(namespaces.c.name == namespace)
        .values(
            used_bytes=namespaces.c.used_bytes + more.bytes,
            used_versions=namespaces.c.used_versions + more.versions,
        )
    )


def _compare(tenant: str, quotas: Quotas, used: Usage, more: Usage) -> None:
    for what, limit, there, added in (
        ("bytes", quotas.max_bytes, used.bytes, more.bytes),
        ("versions", quotas.max_versions, used.versions, more.versions),
    ):
        if limit and there + added > limit:
            caller = current_caller.get()
            if not caller.is_operator and caller.tenant != tenant:
                # Whoever was granted something hears that there is no room, not how much there is.
                message = f"the namespace's tenant can't have so many more {what}"
                raise MeshError(
                    Code.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED, message, metadata={"quota": what}
                )
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.QUOTA_EXCEEDED,
                f"tenant '{tenant}' has {there} {what} of at most {limit}; {added} more are too many",
                metadata={"tenant": tenant, "quota": what, "limit": str(limit), "used": str(there)},
            )
