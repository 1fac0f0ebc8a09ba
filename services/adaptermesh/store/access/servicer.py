"""The gRPC face of tenants, keys, grants and the audit log."""
# Names and signatures are those of the generated base class.
# ruff: noqa: ARG002, N802

from typing import Any

from adaptermesh.api.access.v1 import access_pb2, access_pb2_grpc
from adaptermesh.core.roles import Permission
from adaptermesh.rpc.roles import roles_from
from adaptermesh.store.access import wire
from adaptermesh.store.access.api_keys import unknown_key
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.access.secrets import is_key_id
from adaptermesh.store.pages import PageRequest
from adaptermesh.store.with_stores import WithStores

Context = Any

GRPC_NAME = "adaptermesh.api.access.v1.AccessService"


class AccessServicer(WithStores, access_pb2_grpc.AccessServiceServicer):
    """`adaptermesh.api.access.v1.AccessService`. Errors are raised as `MeshError`."""

    async def GetCaller(
        self, request: access_pb2.GetCallerRequest, context: Context
    ) -> access_pb2.GetCallerResponse:
        return wire.caller_to(current_caller.get())

    async def SetTenant(
        self, request: access_pb2.SetTenantRequest, context: Context
    ) -> access_pb2.SetTenantResponse:
        expected = request.expected_generation if request.HasField("expected_generation") else None
        tenant, position = await self._stores.tenants.set(
            request.tenant.name, wire.quotas_from(request.tenant), expected, request.actor
        )
        return access_pb2.SetTenantResponse(tenant=wire.tenant_to(tenant), feed_position=position)

    async def ListTenants(
        self, request: access_pb2.ListTenantsRequest, context: Context
    ) -> access_pb2.ListTenantsResponse:
        page = await self._stores.tenants.list(current_caller.get(), _page(request))
        return access_pb2.ListTenantsResponse(
            tenants=[
                access_pb2.TenantUsage(tenant=wire.tenant_to(tenant), usage=wire.usage_to(usage))
                for tenant, usage in page.items
            ],
            next_page_token=page.next_token,
        )

    async def SetNamespace(
        self, request: access_pb2.SetNamespaceRequest, context: Context
    ) -> access_pb2.SetNamespaceResponse:
        given, position = await self._stores.tenants.give_namespace(
            request.name, request.tenant, request.actor
        )
        return access_pb2.SetNamespaceResponse(namespace=wire.namespace_to(given), feed_position=position)

    async def ListNamespaces(
        self, request: access_pb2.ListNamespacesRequest, context: Context
    ) -> access_pb2.ListNamespacesResponse:
        page = await self._stores.tenants.list_namespaces(
            request.tenant, current_caller.get(), _page(request)
        )
        return access_pb2.ListNamespacesResponse(
            namespaces=[
                access_pb2.NamespaceUsage(namespace=wire.namespace_to(one), usage=wire.usage_to(usage))
                for one, usage in page.items
            ],
            next_page_token=page.next_token,
        )

    async def CreateApiKey(
        self, request: access_pb2.CreateApiKeyRequest, context: Context
    ) -> access_pb2.CreateApiKeyResponse:
        wanted = wire.key_request_from(request, current_caller.get())
        self._stores.authority.require_tenant(Permission.ADMINISTER, wanted.tenant, wanted.namespaces)
        made = await self._stores.api_keys.create(wanted)
        return access_pb2.CreateApiKeyResponse(
            key=wire.key_to(made.record), secret=made.secret, feed_position=made.feed_position
        )

    async def ListApiKeys(
        self, request: access_pb2.ListApiKeysRequest, context: Context
    ) -> access_pb2.ListApiKeysResponse:
        caller = current_caller.get()
        tenant = request.tenant if request.tenant or caller.is_operator else caller.tenant
        self._stores.authority.require_tenant(Permission.ADMINISTER, tenant)
        page = await self._stores.api_keys.list(tenant, _page(request))
        return access_pb2.ListApiKeysResponse(
            keys=[wire.key_to(key) for key in page.items], next_page_token=page.next_token
        )

    async def RevokeApiKey(
        self, request: access_pb2.RevokeApiKeyRequest, context: Context
    ) -> access_pb2.RevokeApiKeyResponse:
        kept = await self._stores.api_keys.find(request.key_id) if is_key_id(request.key_id) else None
        caller = current_caller.get()
        if kept is None or not (caller.is_operator or kept.record.tenant == caller.tenant):
            raise unknown_key(request.key_id)
        self._stores.authority.require_tenant(
            Permission.ADMINISTER, kept.record.tenant, kept.record.namespaces
        )
        key, position = await self._stores.api_keys.revoke(request.key_id, request.actor)
        return access_pb2.RevokeApiKeyResponse(key=wire.key_to(key), feed_position=position)

    async def SetGrant(
        self, request: access_pb2.SetGrantRequest, context: Context
    ) -> access_pb2.SetGrantResponse:
        wanted = request.grant
        grant, position = await self._stores.grants.set(
            wanted.namespace, wanted.name, wanted.grantee, roles_from(wanted.roles), request.actor
        )
        return access_pb2.SetGrantResponse(grant=wire.grant_to(grant), feed_position=position)

    async def DeleteGrant(
        self, request: access_pb2.DeleteGrantRequest, context: Context
    ) -> access_pb2.DeleteGrantResponse:
        position = await self._stores.grants.delete(
            request.namespace, request.name, request.grantee, request.actor
        )
        return access_pb2.DeleteGrantResponse(feed_position=position)

    async def ListGrants(
        self, request: access_pb2.ListGrantsRequest, context: Context
    ) -> access_pb2.ListGrantsResponse:
        page = await self._stores.grants.list(request.namespace, request.grantee, _page(request))
        return access_pb2.ListGrantsResponse(
            grants=[wire.grant_to(grant) for grant in page.items], next_page_token=page.next_token
        )

    async def ListAuditEntries(
        self, request: access_pb2.ListAuditEntriesRequest, context: Context
    ) -> access_pb2.ListAuditEntriesResponse:
        query = wire.audit_query_from(request)
        page = await self._stores.audit.list(query, current_caller.get(), _page(request))
        return access_pb2.ListAuditEntriesResponse(
            entries=[wire.audit_entry_to(entry) for entry in page.items], next_page_token=page.next_token
        )


def _page(
    request: access_pb2.ListTenantsRequest
    | access_pb2.ListNamespacesRequest
    | access_pb2.ListApiKeysRequest
    | access_pb2.ListGrantsRequest
    | access_pb2.ListAuditEntriesRequest,
) -> PageRequest:
    return PageRequest(request.page_size, request.page_token)
