"""Protocol buffers of the access service to the store's values and back."""

from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.core.errors import invalid_field
from adaptermesh.rpc.roles import role_messages, roles_from
from adaptermesh.store.access.api_keys import KeyRequest
from adaptermesh.store.access.audit import AuditEntry, AuditQuery
from adaptermesh.store.access.caller import Caller
from adaptermesh.store.access.records import (
    ApiKeyRecord,
    GrantRecord,
    NamespaceRecord,
    Quotas,
    TenantRecord,
    Usage,
)


def quotas_from(message: access_pb2.Tenant) -> Quotas:
    return Quotas(message.max_bytes, message.max_versions, message.max_requests_per_minute)


def tenant_to(record: TenantRecord) -> access_pb2.Tenant:
    return access_pb2.Tenant(
        name=record.name,
        max_bytes=record.quotas.max_bytes,
        max_versions=record.quotas.max_versions,
        max_requests_per_minute=record.quotas.max_requests_per_minute,
        generation=record.generation,
        update_time=_time(record.update_time_us),
        actor=record.actor,
    )


def usage_to(usage: Usage) -> access_pb2.Usage:
    return access_pb2.Usage(bytes=usage.bytes, versions=usage.versions)


def namespace_to(record: NamespaceRecord) -> access_pb2.Namespace:
    return access_pb2.Namespace(name=record.name, tenant=record.tenant)


def grant_to(record: GrantRecord) -> access_pb2.Grant:
    return access_pb2.Grant(
        namespace=record.namespace,
        name=record.name,
        grantee=record.grantee,
        roles=role_messages(record.roles),
        update_time=_time(record.update_time_us),
        actor=record.actor,
    )


def key_to(record: ApiKeyRecord) -> access_pb2.ApiKey:
    return access_pb2.ApiKey(
        key_id=record.key_id,
        tenant=record.tenant,
        roles=role_messages(record.roles),
        namespaces=record.namespaces,
        comment=record.comment,
        create_time=_time(record.create_time_us),
        expire_time=_time(record.expire_time_us),
        revoke_time=_time(record.revoke_time_us),
        last_use_time=_time(record.last_use_time_us),
        actor=record.actor,
    )


def caller_to(caller: Caller) -> access_pb2.GetCallerResponse:
    return access_pb2.GetCallerResponse(
        key_id=caller.key_id,
        tenant=caller.tenant,
        roles=role_messages(caller.roles),
        namespaces=caller.namespaces,
        expire_time=_time(caller.expire_time_us),
        max_requests_per_minute=caller.max_requests_per_minute,
    )


def key_request_from(message: access_pb2.CreateApiKeyRequest, caller: Caller) -> KeyRequest:
    """Raises MeshError INVALID_FIELD for what is no role."""
    ttl = message.ttl.seconds + message.ttl.nanos / 1e9 if message.HasField("ttl") else None
    return KeyRequest(
        tenant=message.tenant or caller.tenant,
        roles=roles_from(message.roles),
        namespaces=tuple(message.namespaces),
        ttl_seconds=ttl,
        comment=message.comment,
        actor=message.actor,
    )


def audit_query_from(message: access_pb2.ListAuditEntriesRequest) -> AuditQuery:
    """Raises MeshError INVALID_FIELD for a time that is none."""
    return AuditQuery(
        namespace=message.namespace,
        subject_prefix=message.subject_prefix,
        action=message.action,
        key_id=message.key_id,
        from_time_us=_microseconds("from_time", message),
        until_time_us=_microseconds("until_time", message),
    )


def audit_entry_to(entry: AuditEntry) -> access_pb2.AuditEntry:
    return access_pb2.AuditEntry(
        feed_position=entry.feed_position,
        time=_time(entry.time_us),
        action=entry.action,
        subject=entry.subject,
        namespace=entry.namespace,
        tenant=entry.tenant,
        key_id=entry.key_id,
        key_tenant=entry.key_tenant,
        actor=entry.actor,
    )


def _microseconds(field: str, message: access_pb2.ListAuditEntriesRequest) -> int:
    if not message.HasField(field):  # type: ignore[arg-type]  # one of two names
        return 0
    found: int = getattr(message, field).ToMicroseconds()
    if not 0 <= found < 2**62:
        raise invalid_field(field, "must be between 1970 and 9999")
    return found


def _time(microseconds: int) -> Timestamp | None:
    """None for never."""
    if not microseconds:
        return None
    time = Timestamp()
    time.FromMicroseconds(microseconds)
    return time
