"""Whether a version may be used: it isn't revoked, and it is signed where its namespace asks for that."""

import dataclasses
from collections.abc import Iterable

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.core.errors import MeshError, version_revoked, version_unsigned
from adaptermesh.core.policy_scope import tenant_scope
from adaptermesh.core.refs import Ref
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.version_state import VersionState
from adaptermesh.store.access.quotas import owners_of
from adaptermesh.store.records import PolicyRecord, VersionRecord
from adaptermesh.store.resolution import find_version, get_digest
from adaptermesh.store.rows import StoredVersion, policy_record
from adaptermesh.store.schema import adapters, namespace_policies, version_statuses

# SQLite takes a bounded number of parameters in one statement.
_NAMES_AT_ONCE = 500


async def find_policies(connection: AsyncConnection, namespaces: Iterable[str]) -> dict[str, PolicyRecord]:
    """The policy of each of the namespaces, with the keys that its tenant trusts everywhere."""
    tenants = await owners_of(connection, namespaces)
    said = await _said(connection, (*tenants, *set(map(tenant_scope, tenants.values()))))
    found = {}
    for name, tenant in tenants.items():
        own, shared = said.get(name, PolicyRecord(name)), said.get(tenant_scope(tenant))
        found[name] = own if shared is None else dataclasses.replace(own, keys=own.keys + shared.keys)
    return found


async def find_own_policy(connection: AsyncConnection, scope: str) -> PolicyRecord:
    """What was said of a namespace or a tenant itself."""
    return (await _said(connection, (scope,))).get(scope, PolicyRecord(scope))


async def _said(connection: AsyncConnection, scopes: Iterable[str]) -> dict[str, PolicyRecord]:
    names, found = sorted(set(scopes)), {}
    for start in range(0, len(names), _NAMES_AT_ONCE):
        some = names[start : start + _NAMES_AT_ONCE]
        query = select(namespace_policies).where(namespace_policies.c.namespace.in_(some))
        for row in await connection.execute(query):
            found[row.namespace] = policy_record(row)
    return found


async def find_policy(connection: AsyncConnection, namespace: str) -> PolicyRecord:
    """The policy of a namespace, with the keys that its tenant trusts everywhere."""
    return (await find_policies(connection, (namespace,)))[namespace]


async def find_usable(connection: AsyncConnection, ref: Ref) -> StoredVersion:
    """The version a ref means now, to use it or to point at it.

    Raises:
        MeshError: as `find_version`; FAILED_PRECONDITION (VERSION_REVOKED, VERSION_UNSIGNED).
    """
    found = await find_version(connection, ref)
    policy = await find_policy(connection, ref.adapter.namespace)
    problem = why_not(str(ref), found.record, policy)
    if problem is not None:
        raise problem
    return found


async def get_usable(connection: AsyncConnection, digest: str) -> StoredVersion:
    """The version with a digest, to use it.

    Raises:
        MeshError: as `get_digest`; FAILED_PRECONDITION (VERSION_REVOKED, VERSION_UNSIGNED).
    """
    found = await get_digest(connection, digest)
    problem = why_not(digest, found.record, await find_policy(connection, found.record.namespace))
    if problem is not None:
        raise problem
    return found


def why_not(ref: str, version: VersionRecord, policy: PolicyRecord) -> MeshError | None:
    """The refusal of a version that must not be used; None for any other."""
    if version.revoked:
        return version_revoked(ref, version.ref, version.digest, version.status.reason)
    if policy.signatures is SignaturePolicy.NONE or is_signed(version, policy):
        return None
    return version_unsigned(ref, version.ref, version.digest, policy.namespace)


def suspects(policies: Iterable[PolicyRecord]) -> ColumnElement[bool]:
    """Which of `SELECT_VERSIONS` of these namespaces `why_not` may refuse; all others may be used."""
    strict = [policy.namespace for policy in policies if policy.signatures is not SignaturePolicy.NONE]
    revoked = version_statuses.c.state == VersionState.REVOKED.value
    return revoked | adapters.c.namespace.in_(strict) if strict else revoked


def is_signed(version: VersionRecord, policy: PolicyRecord) -> bool:
    """Whether a key that the namespace trusts now has signed it."""
    return any(policy.key(signature.key_id) is not None for signature in version.signatures)
