"""Stands before every call: who is it, may the tenant call again, and may it do this?

What only the answer depends on, such as which adapters a list shows, is decided where the answer is made.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from adaptermesh.core.composition import is_composition, leaves, parse_composition
from adaptermesh.core.digests import is_digest
from adaptermesh.core.policy_scope import check_scope, tenant_of_scope
from adaptermesh.core.rates import Rates
from adaptermesh.core.refs import BASE, AdapterName, check_name, parse_ref
from adaptermesh.core.roles import Permission
from adaptermesh.store.access.authentication import Authentication
from adaptermesh.store.access.authority import Authority
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.catalogue import Catalogue
from adaptermesh.store.routes import MAX_TARGETS

READ, PUBLISH, DEPLOY = Permission.READ, Permission.PUBLISH, Permission.DEPLOY
ADMINISTER = Permission.ADMINISTER

# Gateways ask it often, for calls that they count themselves.
_WHO = "GetCaller"

Guard = Callable[["Gatekeeper", Any], Awaitable[None]]


class Gatekeeper:
    """Admits calls to the services of the store."""

    def __init__(
        self,
        check_open: Callable[[], None],
        authentication: Authentication,
        authority: Authority,
        catalogue: Catalogue,
        rates: Rates,
    ) -> None:
        self._check_open = check_open
        self._authentication = authentication
        self._catalogue = catalogue
        self._rates = rates
        self.authority = authority

    async def admit(self, method: str, metadata: Mapping[str, str], request: Any) -> None:
        """Returns if the call may go on, with the caller in the context.

        Args:
            method: `<package>.<service>/<name>`.
            metadata: what came with the call.
            request: the message; None if the caller streams them.

        Raises:
            MeshError: UNAUTHENTICATED, PERMISSION_DENIED, RESOURCE_EXHAUSTED or NOT_FOUND.
        """
        if not self._authentication.required:
            return
        self._check_open()
        caller = await self._authentication.caller(metadata)
        current_caller.set(caller)
        name = method.partition("/")[2]
        if name != _WHO:
            self._rates.take(caller.tenant, caller.max_requests_per_minute)
        guard = GUARDS[name]
        if guard is not None:
            await guard(self, request)

    async def require_digest(self, permission: Permission, digest: str) -> None:
        """Returns if the caller may do it with the version; one that isn't there is the call's to refuse."""
        if self.authority.unrestricted(permission) or not is_digest(digest):
            return
        found = await self._catalogue.find_digest(digest)
        if found is not None:
            await self.authority.require_version(permission, found.record.adapter, digest)


def _adapter(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, request: Any) -> None:
        await keeper.authority.require(permission, AdapterName.checked(request.namespace, request.name))

    return guard


def _namespace(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, request: Any) -> None:
        namespace = check_name(request.namespace, "namespace")
        await keeper.authority.require_namespace(permission, namespace)

    return guard


def _digest(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, request: Any) -> None:
        await keeper.require_digest(permission, request.digest)

    return guard


def _operator(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, _request: Any) -> None:
        keeper.authority.require_operator(permission)

    return guard


def _anywhere(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, _request: Any) -> None:
        keeper.authority.require_anywhere(permission)

    return guard


def _policy(permission: Permission) -> Guard:
    async def guard(keeper: Gatekeeper, request: Any) -> None:
        scope = check_scope(request.namespace)
        tenant = tenant_of_scope(scope)
        if tenant:
            keeper.authority.require_tenant(permission, tenant)
        else:
            await keeper.authority.require_namespace(permission, scope)

    return guard


async def _resolve(keeper: Gatekeeper, request: Any) -> None:
    if request.digest:
        await keeper.require_digest(READ, request.digest)
    else:
        await keeper.authority.require(READ, parse_ref(request.ref).adapter)


async def _status(keeper: Gatekeeper, request: Any) -> None:
    await _adapter(DEPLOY)(keeper, request)
    if request.replacement:
        await keeper.authority.require(READ, parse_ref(request.replacement).adapter)


async def _alias(keeper: Gatekeeper, request: Any) -> None:
    # A protected alias needs more than any other.
    await _adapter(ADMINISTER if request.acknowledge_protection else DEPLOY)(keeper, request)


async def _set_route(keeper: Gatekeeper, request: Any) -> None:
    keeper.authority.require_tenant(DEPLOY, request.route.tenant)
    # More are refused as soon as the call has passed.
    targets = request.route.targets[: MAX_TARGETS + 1]
    adapters = {parse_ref(ref).adapter for target in targets for ref in _refs(target.ref)}
    for adapter in adapters:
        await keeper.authority.require(READ, adapter)


async def _delete_route(keeper: Gatekeeper, request: Any) -> None:
    keeper.authority.require_tenant(DEPLOY, request.tenant)


async def _verify(keeper: Gatekeeper, request: Any) -> None:
    if request.digest:
        await keeper.require_digest(ADMINISTER, request.digest)
    else:
        keeper.authority.require_operator(ADMINISTER)


async def _grant(keeper: Gatekeeper, request: Any) -> None:
    await keeper.authority.require_namespace(ADMINISTER, check_name(request.grant.namespace, "namespace"))


async def _grants(keeper: Gatekeeper, request: Any) -> None:
    if request.namespace:
        await _namespace(ADMINISTER)(keeper, request)
    else:
        keeper.authority.require_tenant(ADMINISTER, request.grantee)


def _refs(text: str) -> list[str]:
    if text == BASE:
        return []
    return [leaf.name for leaf in leaves(parse_composition(text))] if is_composition(text) else [text]


GUARDS: Mapping[str, Guard | None] = {
    # None: decided where the answer is made.
    "UploadAdapter": None,
    "BeginUpload": None,
    # Who has the upload's id has begun it, and completing it asks again.
    "UploadPart": _anywhere(PUBLISH),
    "GetUpload": _anywhere(PUBLISH),
    "CompleteUpload": _anywhere(PUBLISH),
    "AbandonUpload": _anywhere(PUBLISH),
    "DownloadFile": _digest(READ),
    "FetchAdapter": _digest(READ),
    "ResolveRef": _resolve,
    "ListVersions": _adapter(READ),
    "SetVersionStatus": _status,
    "ListStatusHistory": _adapter(READ),
    "DeleteVersion": _adapter(ADMINISTER),
    "AddSignature": _digest(PUBLISH),
    "ListSignatures": _digest(READ),
    "GetNamespacePolicy": _policy(READ),
    "SetNamespacePolicy": _namespace(ADMINISTER),
    "AddSigningKey": _policy(ADMINISTER),
    "DeleteSigningKey": _policy(ADMINISTER),
    "ListAdapters": _anywhere(READ),
    "SearchAdapters": _anywhere(READ),
    "GetDownloadCounts": _anywhere(READ),
    "SetAlias": _alias,
    "RollBackAlias": _alias,
    "SetAliasProtection": _adapter(ADMINISTER),
    "DeleteAlias": _alias,
    "ListAliasHistory": _adapter(READ),
    "SetRoute": _set_route,
    "DeleteRoute": _delete_route,
    "ListRoutes": _anywhere(READ),
    # Of workers, with an operator's reader key: its name is the whole mesh's.
    "RegisterBaseModel": _operator(READ),
    "ListBaseModels": _anywhere(READ),
    "GetSnapshot": _operator(READ),
    "WatchChanges": _operator(READ),
    "GetFeedStatus": _operator(READ),
    "CollectGarbage": _operator(ADMINISTER),
    "VerifyBlobs": _verify,
    "GetCaller": None,
    "SetTenant": _operator(ADMINISTER),
    "ListTenants": None,
    "SetNamespace": _operator(ADMINISTER),
    "ListNamespaces": None,
    "CreateApiKey": None,
    "ListApiKeys": None,
    "RevokeApiKey": None,
    "SetGrant": _grant,
    "DeleteGrant": _namespace(ADMINISTER),
    "ListGrants": _grants,
    "ListAuditEntries": _anywhere(ADMINISTER),
}
"""Of each method what is asked before it; a method that is not here can't be called."""
