"""What namespaces ask of their versions: the keys that they trust, and whether a signature is needed."""

import dataclasses
import logging
from collections.abc import Callable

from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.artifact.signing import is_public_key, key_id_of
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, not_found
from adaptermesh.core.policy_scope import check_scope, tenant_scope
from adaptermesh.core.refs import check_name
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.store.access.quotas import owners_of
from adaptermesh.store.access.tenants import check_tenant
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change
from adaptermesh.store.fields import MAX_ACTOR, MAX_COMMENT, check_generation, check_text
from adaptermesh.store.records import ChangeKind, PolicyRecord, SigningKey
from adaptermesh.store.schema import namespace_policies
from adaptermesh.store.usability import find_own_policy

log = logging.getLogger(__name__)

MAX_KEYS = 64

Step = Callable[[PolicyRecord, int], PolicyRecord]
"""From a policy and the time to what it shall be."""


class Policies:
    """The policies of namespaces and tenants. A change of the keys is one of the policy."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def get(self, scope: str) -> tuple[PolicyRecord, PolicyRecord | None]:
        """What was said of a namespace or a tenant, also if it is nothing; and of a namespace's tenant."""
        check_scope(scope)
        async with self._database.reading() as connection:
            own = await find_own_policy(connection, scope)
            if own.tenant:
                return own, None
            tenant = (await owners_of(connection, (scope,)))[scope]
            return own, await find_own_policy(connection, tenant_scope(tenant))

    async def set(
        self,
        namespace: str,
        signatures: SignaturePolicy,
        expected_generation: int | None = None,
        actor: str = "",
    ) -> tuple[PolicyRecord, int]:
        """Says whether versions must be signed; returns the policy and the feed position.

        Raises:
            MeshError: POLICY_CONFLICT if it has changed since.
        """
        check_generation(expected_generation)
        check_name(namespace, "namespace")

        def step(policy: PolicyRecord, _now_us: int) -> PolicyRecord:
            if expected_generation not in (None, policy.generation):
                raise _conflict(policy, expected_generation)
            return dataclasses.replace(policy, signatures=signatures)

        return await self._change(namespace, actor, step)

    async def trust(
        self, scope: str, public_key: bytes, comment: str = "", actor: str = ""
    ) -> tuple[PolicyRecord, int]:
        """Makes a namespace, or all of a tenant, trust a key; returns the policy and the feed position.

        Raises:
            MeshError: INVALID_FIELD for what is no Ed25519 key; FAILED_PRECONDITION for one key too many.
        """
        check_text("comment", comment, MAX_COMMENT)
        if not is_public_key(public_key):
            raise invalid_field("public_key", "must be a raw Ed25519 public key of 32 bytes")
        key_id = key_id_of(public_key)

        def step(policy: PolicyRecord, now_us: int) -> PolicyRecord:
            others = tuple(key for key in policy.keys if key.key_id != key_id)
            if len(others) >= MAX_KEYS:
                raise MeshError(
                    Code.FAILED_PRECONDITION,
                    Reason.INVALID_FIELD,
                    f"public_key: {scope} trusts {MAX_KEYS} keys, the limit",
                    metadata={"field": "public_key"},
                )
            key = SigningKey(key_id, public_key.hex(), now_us, comment, actor)
            return dataclasses.replace(policy, keys=tuple(sorted((*others, key), key=lambda one: one.key_id)))

        return await self._change(scope, actor, step)

    async def distrust(self, scope: str, key_id: str, actor: str = "") -> tuple[PolicyRecord, int]:
        """Ends the trust in a key; returns the policy and the feed position.

        Raises:
            MeshError: SIGNING_KEY_NOT_FOUND.
        """

        def step(policy: PolicyRecord, _now_us: int) -> PolicyRecord:
            if policy.key(key_id) is None:
                raise unknown_key(scope, key_id)
            return dataclasses.replace(policy, keys=tuple(key for key in policy.keys if key.key_id != key_id))

        return await self._change(scope, actor, step)

    async def _change(self, scope: str, actor: str, step: Step) -> tuple[PolicyRecord, int]:
        check_scope(scope)
        check_text("actor", actor, MAX_ACTOR)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> tuple[PolicyRecord, int]:
            policy = await find_own_policy(connection, scope)
            if policy.tenant:
                await check_tenant(connection, policy.tenant)
            changed = dataclasses.replace(
                step(policy, now_us), generation=policy.generation + 1, update_time_us=now_us, actor=actor
            )
            await _save(connection, changed)
            return changed, await append_change(connection, ChangeKind.NAMESPACE_POLICY_SET, changed, now_us)

        changed, position = await self._database.write(work)
        log.info(
            "namespace policy set",
            extra={
                "scope": scope,
                "signatures": changed.signatures.value,
                "keys": [key.key_id for key in changed.keys],
                "generation": changed.generation,
                "feed_position": position,
            },
        )
        return changed, position


def unknown_key(scope: str, key_id: str) -> MeshError:
    """NOT_FOUND (SIGNING_KEY_NOT_FOUND)."""
    what = f"signing key of '{scope}'"
    return not_found(Reason.SIGNING_KEY_NOT_FOUND, what, key_id[:200])


async def _save(connection: AsyncConnection, policy: PolicyRecord) -> None:
    row = {**dataclasses.asdict(policy), "signatures": policy.signatures.value}
    if policy.generation > 1:
        same = namespace_policies.c.namespace == policy.namespace
        await connection.execute(update(namespace_policies).where(same).values(row))
    else:
        await connection.execute(insert(namespace_policies).values(row))


def _conflict(policy: PolicyRecord, expected: int | None) -> MeshError:
    return MeshError(
        Code.ABORTED,
        Reason.POLICY_CONFLICT,
        f"the policy of namespace '{policy.namespace}' is at generation {policy.generation}, not {expected}",
        metadata={"name": policy.namespace, "generation": str(policy.generation)},
    )
