"""Rows of tenants, keys and grants to records."""

from typing import Any

from sqlalchemy import Row

from adaptermesh.core.roles import Role
from adaptermesh.store.access.records import ApiKeyRecord, GrantRecord, Quotas, TenantRecord


def tenant_record(row: Row[Any]) -> TenantRecord:
    quotas = Quotas(row.max_bytes, row.max_versions, row.max_requests_per_minute)
    return TenantRecord(row.name, quotas, row.generation, row.update_time_us, row.actor)


def grant_record(row: Any) -> GrantRecord:
    return GrantRecord(
        row.namespace, row.name, row.grantee, tuple(map(Role, row.roles)), row.update_time_us, row.actor
    )


def key_record(row: Any) -> ApiKeyRecord:
    return ApiKeyRecord(
        key_id=row.key_id,
        tenant=row.tenant,
        roles=tuple(map(Role, row.roles)),
        namespaces=tuple(row.namespaces),
        comment=row.comment,
        create_time_us=row.create_time_us,
        expire_time_us=row.expire_time_us,
        revoke_time_us=row.revoke_time_us,
        last_use_time_us=row.last_use_time_us,
        actor=row.actor,
    )
