"""Messages of the access service to records."""

import datetime
from typing import Any

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.client.access_records import ApiKey, AuditEntry, Caller, Grant, Namespace, Tenant, Usage
from adaptermesh.client.wire import time_of
from adaptermesh.rpc.roles import roles_of


def tenant_of(message: access_pb2.Tenant, usage: access_pb2.Usage | None = None) -> Tenant:
    return Tenant(
        name=message.name,
        max_bytes=message.max_bytes,
        max_versions=message.max_versions,
        max_requests_per_minute=message.max_requests_per_minute,
        generation=message.generation,
        update_time=_time(message, "update_time"),
        actor=message.actor,
        usage=_usage(usage),
    )


def namespace_of(message: access_pb2.Namespace, usage: access_pb2.Usage | None = None) -> Namespace:
    return Namespace(message.name, message.tenant, _usage(usage))


def grant_of(message: access_pb2.Grant) -> Grant:
    return Grant(
        namespace=message.namespace,
        name=message.name,
        grantee=message.grantee,
        roles=roles_of(message.roles),
        update_time=_time(message, "update_time"),
        actor=message.actor,
    )


def key_of(message: access_pb2.ApiKey) -> ApiKey:
    return ApiKey(
        key_id=message.key_id,
        tenant=message.tenant,
        roles=roles_of(message.roles),
        namespaces=tuple(message.namespaces),
        comment=message.comment,
        create_time=_time(message, "create_time"),
        expire_time=_time(message, "expire_time"),
        revoke_time=_time(message, "revoke_time"),
        last_use_time=_time(message, "last_use_time"),
        actor=message.actor,
    )


def caller_of(message: access_pb2.GetCallerResponse) -> Caller:
    return Caller(
        key_id=message.key_id,
        tenant=message.tenant,
        roles=roles_of(message.roles),
        namespaces=tuple(message.namespaces),
        expire_time=_time(message, "expire_time"),
    )


def audit_entry_of(message: access_pb2.AuditEntry) -> AuditEntry:
    return AuditEntry(
        feed_position=message.feed_position,
        time=_time(message, "time"),
        action=message.action,
        subject=message.subject,
        namespace=message.namespace,
        tenant=message.tenant,
        key_id=message.key_id,
        key_tenant=message.key_tenant,
        actor=message.actor,
    )


def _usage(message: access_pb2.Usage | None) -> Usage | None:
    return None if message is None else Usage(message.bytes, message.versions)


def _time(message: Any, field: str) -> datetime.datetime | None:
    """None for never."""
    return time_of(getattr(message, field)) if message.HasField(field) else None
