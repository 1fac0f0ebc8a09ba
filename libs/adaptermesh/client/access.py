"""The calls about tenants, namespaces, keys, grants and the audit log."""

import datetime
from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.access.v1 import access_pb2, access_pb2_grpc
from adaptermesh.client import access_wire
from adaptermesh.client.access_records import (
    ApiKey,
    ApiKeyChange,
    AuditEntry,
    AuditQuery,
    Caller,
    Grant,
    GrantChange,
    Namespace,
    NamespaceChange,
    NewApiKey,
    Tenant,
    TenantChange,
)
from adaptermesh.client.calls import PAGE_SIZE, Deadlines, all_pages
from adaptermesh.client.store_connection import StoreConnection
from adaptermesh.core.roles import Role
from adaptermesh.rpc.roles import role_messages


class AccessCalls(StoreConnection):
    """The part of the store's client that is about who may do what."""

    def __init__(self, target: str, deadlines: Deadlines, api_key: str = "") -> None:
        super().__init__(target, deadlines, api_key)
        self._access = access_pb2_grpc.AccessServiceStub(self._channel)

    async def caller(self) -> Caller:
        """Whom the client's key stands for."""
        response = await self._call(self._access.GetCaller, access_pb2.GetCallerRequest())
        return access_wire.caller_of(response)

    async def set_tenant(
        self,
        name: str,
        *,
        max_bytes: int = 0,
        max_versions: int = 0,
        max_requests_per_minute: int = 0,
        expected_generation: int | None = None,
        actor: str = "",
    ) -> TenantChange:
        """Makes a tenant known, or replaces its quotas; 0 is no bound."""
        tenant = access_pb2.Tenant(
            name=name,
            max_bytes=max_bytes,
            max_versions=max_versions,
            max_requests_per_minute=max_requests_per_minute,
        )
        request = access_pb2.SetTenantRequest(
            tenant=tenant, expected_generation=expected_generation, actor=actor
        )
        response = await self._call(self._access.SetTenant, request)
        return TenantChange(access_wire.tenant_of(response.tenant), response.feed_position)

    async def list_tenants(self) -> list[Tenant]:
        """The tenants that the key may see, with what they use."""

        async def page(token: str) -> tuple[list[Tenant], str]:
            request = access_pb2.ListTenantsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._access.ListTenants, request)
            found = [access_wire.tenant_of(item.tenant, item.usage) for item in response.tenants]
            return found, response.next_page_token

        return await all_pages(page)

    async def set_namespace(self, name: str, tenant: str, *, actor: str = "") -> NamespaceChange:
        """Gives a namespace to a tenant."""
        request = access_pb2.SetNamespaceRequest(name=name, tenant=tenant, actor=actor)
        response = await self._call(self._access.SetNamespace, request)
        return NamespaceChange(access_wire.namespace_of(response.namespace), response.feed_position)

    async def list_namespaces(self, tenant: str = "") -> list[Namespace]:
        """The namespaces of a tenant, or all that the key may see, with what they hold."""

        async def page(token: str) -> tuple[list[Namespace], str]:
            request = access_pb2.ListNamespacesRequest(tenant=tenant, page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._access.ListNamespaces, request)
            found = [access_wire.namespace_of(item.namespace, item.usage) for item in response.namespaces]
            return found, response.next_page_token

        return await all_pages(page)

    async def create_api_key(
        self,
        roles: Iterable[Role],
        *,
        tenant: str = "",
        namespaces: Sequence[str] = (),
        ttl: datetime.timedelta | None = None,
        comment: str = "",
        actor: str = "",
    ) -> NewApiKey:
        """Makes a key; only here is its secret told.

        Args:
            roles: what it shall allow.
            tenant: whose it is, "*" for an operator's; the caller's own if left out.
            namespaces: it shall be good in these only; everywhere if left out.
            ttl: how long it shall be valid; for good if left out.
            comment: what it is for.
            actor: who makes it.
        """
        duration = Duration()
        if ttl is not None:
            duration.FromTimedelta(ttl)
        request = access_pb2.CreateApiKeyRequest(
            tenant=tenant,
            roles=role_messages(sorted(set(roles))),
            namespaces=namespaces,
            ttl=None if ttl is None else duration,
            comment=comment,
            actor=actor,
        )
        response = await self._call(self._access.CreateApiKey, request)
        return NewApiKey(access_wire.key_of(response.key), response.secret, response.feed_position)

    async def list_api_keys(self, tenant: str = "") -> list[ApiKey]:
        """The keys of a tenant, newest first."""

        async def page(token: str) -> tuple[list[ApiKey], str]:
            request = access_pb2.ListApiKeysRequest(tenant=tenant, page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._access.ListApiKeys, request)
            return [access_wire.key_of(key) for key in response.keys], response.next_page_token

        return await all_pages(page)

    async def revoke_api_key(self, key_id: str, *, actor: str = "") -> ApiKeyChange:
        """Ends a key for good."""
        request = access_pb2.RevokeApiKeyRequest(key_id=key_id, actor=actor)
        response = await self._call(self._access.RevokeApiKey, request)
        return ApiKeyChange(access_wire.key_of(response.key), response.feed_position)

    async def set_grant(
        self, namespace: str, grantee: str, roles: Iterable[Role], *, name: str = "", actor: str = ""
    ) -> GrantChange:
        """Allows a tenant, or everybody ("*"), something in a namespace, or with one adapter of it."""
        grant = access_pb2.Grant(
            namespace=namespace, name=name, grantee=grantee, roles=role_messages(sorted(set(roles)))
        )
        request = access_pb2.SetGrantRequest(grant=grant, actor=actor)
        response = await self._call(self._access.SetGrant, request)
        return GrantChange(access_wire.grant_of(response.grant), response.feed_position)

    async def delete_grant(self, namespace: str, grantee: str, *, name: str = "", actor: str = "") -> int:
        """Takes a grant back; returns the feed position."""
        request = access_pb2.DeleteGrantRequest(namespace=namespace, name=name, grantee=grantee, actor=actor)
        return (await self._call(self._access.DeleteGrant, request)).feed_position

    async def list_grants(self, *, namespace: str = "", grantee: str = "") -> list[Grant]:
        """The grants of a namespace, or those to a tenant or to everybody; exactly one must be given."""

        async def page(token: str) -> tuple[list[Grant], str]:
            request = access_pb2.ListGrantsRequest(
                namespace=namespace, grantee=grantee, page_size=PAGE_SIZE, page_token=token
            )
            response = await self._call(self._access.ListGrants, request)
            return [access_wire.grant_of(grant) for grant in response.grants], response.next_page_token

        return await all_pages(page)

    async def audit(self, query: AuditQuery | None = None, *, limit: int = 100) -> list[AuditEntry]:
        """The newest entries of the audit log that match, at most `limit`."""
        asked = query or AuditQuery()
        found: list[AuditEntry] = []
        token = ""
        while len(found) < limit:
            request = access_pb2.ListAuditEntriesRequest(
                namespace=asked.namespace,
                subject_prefix=asked.subject_prefix,
                action=asked.action,
                key_id=asked.key_id,
                from_time=_timestamp(asked.from_time),
                until_time=_timestamp(asked.until_time),
                page_size=min(PAGE_SIZE, limit - len(found)),
                page_token=token,
            )
            response = await self._call(self._access.ListAuditEntries, request)
            found += [access_wire.audit_entry_of(entry) for entry in response.entries]
            token = response.next_page_token
            if not token:
                break
        return found


def _timestamp(time: datetime.datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
