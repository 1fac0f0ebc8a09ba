"""Signatures, the keys that a namespace trusts, and a namespace that asks for signatures."""

import asyncio
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.signing import key_id_of, signed_message
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason
from adaptermesh.store.access.records import Quotas

REQUIRED = adapter_pb2.SIGNATURE_POLICY_REQUIRED
NONE = adapter_pb2.SIGNATURE_POLICY_NONE


class Key:
    """A key pair; `seed` makes it the same each time."""

    def __init__(self, seed: int = 1) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.public = self._private.public_key().public_bytes_raw()
        self.key_id = key_id_of(self.public)

    def sign(self, digest: str) -> bytes:
        return self._private.sign(signed_message(digest))


KEY, OTHER = Key(1), Key(2)


async def trust(store: Any, key: Key = KEY, **fields: Any) -> Any:
    values = {"namespace": "acme", "public_key": key.public, **fields}
    return await store.stub.AddSigningKey(store_pb2.AddSigningKeyRequest(**values))


async def distrust(store: Any, key: Key = KEY, **fields: Any) -> Any:
    values = {"namespace": "acme", "key_id": key.key_id, **fields}
    return await store.stub.DeleteSigningKey(store_pb2.DeleteSigningKeyRequest(**values))


async def require(store: Any, policy: Any = REQUIRED, **fields: Any) -> Any:
    values = {"namespace": "acme", "signatures": policy, **fields}
    return await store.stub.SetNamespacePolicy(store_pb2.SetNamespacePolicyRequest(**values))


async def sign(store: Any, digest: str, key: Key = KEY, **fields: Any) -> Any:
    values = {"digest": digest, "key_id": key.key_id, "signature": key.sign(digest), **fields}
    return await store.stub.AddSignature(store_pb2.AddSignatureRequest(**values))


async def signatures(store: Any, digest: str) -> list[adapter_pb2.Signature]:
    request = store_pb2.ListSignaturesRequest(digest=digest)
    return list((await store.stub.ListSignatures(request)).signatures)


async def resolve(store: Any, ref: str, **fields: Any) -> Any:
    return (await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref=ref, **fields))).version


async def point(store: Any, version: int, alias: str = "prod") -> Any:
    request = store_pb2.SetAliasRequest(namespace="acme", name="ner", alias=alias, version_number=version)
    return await store.stub.SetAlias(request)


async def route(store: Any, ref: str) -> Any:
    targets = [adapter_pb2.RouteTarget(ref=ref, weight=1)]
    request = store_pb2.SetRouteRequest(route=adapter_pb2.Route(tenant="*", task="ner", targets=targets))
    return await store.stub.SetRoute(request)


async def test_a_signature_is_verified_and_kept_with_who_added_it(store: Any, publish: Any) -> None:
    (version,) = await publish()
    await trust(store)
    signed = await sign(store, version.digest, actor="ada")
    assert (signed.created, list(signed.version.signing_key_ids)) == (True, [KEY.key_id])
    assert signed.version.digest == version.digest
    (kept,) = await signatures(store, version.digest)
    assert (kept.key_id, kept.signature, kept.actor) == (KEY.key_id, KEY.sign(version.digest), "ada")
    assert kept.trusted
    assert await resolve(store, "acme/ner:v1") == signed.version


async def test_the_same_key_again_changes_nothing(store: Any, publish: Any) -> None:
    (version,) = await publish()
    await trust(store)
    first = await sign(store, version.digest)
    again = await sign(store, version.digest, actor="bob")
    assert (again.created, again.version) == (False, first.version)
    assert again.feed_position == (await store.snapshot()).feed_position == first.feed_position


async def test_a_bad_signature_is_refused(store: Any, publish: Any, kit: Any) -> None:
    first, second = await publish(seeds=(1, 2))
    await trust(store)
    for bad in (
        KEY.sign(second.digest),
        OTHER.sign(first.digest),
        KEY._private.sign(first.digest.encode()),
        b"",
        bytes(64),
        KEY.sign(first.digest)[:-1],
    ):
        async with kit.refused() as errors:
            await sign(store, first.digest, signature=bad)
        assert (errors[0].code, errors[0].reason) == (Code.INVALID_ARGUMENT, Reason.SIGNATURE_INVALID)
    assert await signatures(store, first.digest) == []


async def test_a_key_signs_only_where_its_namespace_trusts_it(store: Any, publish: Any, kit: Any) -> None:
    (version,) = await publish()
    await trust(store, namespace="other")
    async with kit.refused() as errors:
        await sign(store, version.digest)
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.SIGNING_KEY_NOT_FOUND)
    assert errors[0].metadata["name"] == KEY.key_id


async def test_an_unknown_version_has_no_signatures(store: Any, kit: Any) -> None:
    await trust(store)
    unknown = digest_bytes(b"nobody")
    for call in (sign(store, unknown), signatures(store, unknown)):
        async with kit.refused() as errors:
            await call
        assert errors[0].reason is Reason.VERSION_NOT_FOUND


async def test_a_version_that_must_be_signed_and_is_not_is_refused_everywhere(
    store: Any, publish: Any, kit: Any
) -> None:
    first, second = await publish(seeds=(1, 2))
    await trust(store)
    await point(store, 1)
    await sign(store, second.digest)
    await require(store)
    for use in (
        resolve(store, "acme/ner:v1"),
        resolve(store, "acme/ner@prod"),
        point(store, 1, "canary"),
        route(store, "acme/ner@prod"),
        route(store, "average(acme/ner:v2, acme/ner:v1)"),
    ):
        async with kit.refused() as errors:
            await use
        assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_UNSIGNED)
        assert errors[0].metadata["digest"] == first.digest
    assert (await resolve(store, "acme/ner:v1", include_unusable=True)).digest == first.digest
    (adapter,) = (await store.stub.ListAdapters(store_pb2.ListAdaptersRequest())).adapters
    assert list(adapter.unusable_numbers) == [1]
    await point(store, 2)
    await route(store, "acme/ner@prod")
    await sign(store, first.digest)
    assert (await resolve(store, "acme/ner:v1")).number == 1


async def test_a_worker_can_not_fetch_what_must_be_signed_and_is_not(
    store: Any, publish: Any, kit: Any
) -> None:
    (version,) = await publish()
    await require(store)
    await trust(store)

    async def fetch(**fields: Any) -> int:
        request = store_pb2.FetchAdapterRequest(digest=version.digest, **fields)
        return len([message async for message in store.stub.FetchAdapter(request)])

    async with kit.refused() as errors:
        await fetch()
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_UNSIGNED)
    assert errors[0].metadata["version"] == "acme/ner:v1"
    assert await fetch(include_unusable=True) > 1
    await sign(store, version.digest)
    assert await fetch() > 1


async def test_a_namespace_that_asks_for_nothing_takes_any_version(store: Any, publish: Any) -> None:
    await publish()
    await publish(namespace="free")
    await require(store)
    assert (await resolve(store, "free/ner:v1")).number == 1
    await require(store, NONE)
    assert (await resolve(store, "acme/ner:v1")).number == 1


async def test_a_signature_counts_for_as_long_as_its_key_is_trusted(
    store: Any, publish: Any, kit: Any
) -> None:
    (version,) = await publish()
    await trust(store)
    await sign(store, version.digest)
    await require(store)
    await distrust(store)
    assert [one.trusted for one in await signatures(store, version.digest)] == [False]
    async with kit.refused() as errors:
        await resolve(store, "acme/ner:v1")
    assert errors[0].reason is Reason.VERSION_UNSIGNED
    await trust(store)
    assert (await resolve(store, "acme/ner:v1")).number == 1


async def test_a_policy_names_its_keys_and_counts_its_changes(store: Any) -> None:
    empty = await store.stub.GetNamespacePolicy(store_pb2.GetNamespacePolicyRequest(namespace="acme"))
    assert empty.policy == adapter_pb2.NamespacePolicy(namespace="acme", signatures=NONE)
    added = await trust(store, comment="release", actor="ada")
    assert added.key_id == KEY.key_id
    (key,) = added.policy.keys
    assert (key.key_id, key.public_key, key.comment, key.actor) == (
        KEY.key_id,
        KEY.public,
        "release",
        "ada",
    )
    await trust(store, comment="the same key")
    policy = (await require(store, expected_generation=2, actor="bob")).policy
    assert (policy.generation, policy.signatures, policy.actor) == (3, REQUIRED, "bob")
    assert [one.comment for one in policy.keys] == ["the same key"]
    kept = await store.stub.GetNamespacePolicy(store_pb2.GetNamespacePolicyRequest(namespace="acme"))
    assert kept.policy == policy


async def test_exactly_one_of_many_setters_of_a_policy_wins(store: Any) -> None:
    attempts = (require(store, expected_generation=0) for _ in range(6))
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(one, store_pb2.SetNamespacePolicyResponse) for one in outcomes) == 1


async def test_what_can_not_be_a_key_or_a_policy_is_refused(store: Any, kit: Any) -> None:
    await trust(store)
    cases = [
        (trust(store, public_key=b"short"), Reason.INVALID_FIELD),
        (trust(store, namespace="No"), Reason.INVALID_NAME),
        (trust(store, comment="x" * 1025), Reason.INVALID_FIELD),
        (distrust(store, OTHER), Reason.SIGNING_KEY_NOT_FOUND),
        (require(store, adapter_pb2.SIGNATURE_POLICY_UNSPECIFIED), Reason.INVALID_FIELD),
        (require(store, 77), Reason.INVALID_FIELD),
        (require(store, expected_generation=0), Reason.POLICY_CONFLICT),
    ]
    for call, reason in cases:
        async with kit.refused() as errors:
            await call
        assert errors[0].reason is reason


async def test_a_namespace_trusts_so_many_keys_and_no_more(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermesh.store.policies.MAX_KEYS", 1)
    await trust(store)
    await trust(store)
    async with kit.refused() as errors:
        await trust(store, OTHER)
    assert errors[0].code is Code.FAILED_PRECONDITION


async def test_watchers_and_snapshots_hear_of_policies_and_signatures(store: Any, publish: Any) -> None:
    (version,) = await publish()
    start = (await store.snapshot()).feed_position
    policy = (await trust(store)).policy
    signed = (await sign(store, version.digest)).version
    whole = await store.snapshot()
    assert (list(whole.policies), list(whole.versions)) == ([policy], [signed])
    call = store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=whole.feed_id, after_position=start))
    first, second = await call.read(), await call.read()
    call.cancel()
    assert first.change.namespace_policy_set == policy
    assert second.change.version_signed == signed


async def test_a_key_of_the_tenant_counts_in_all_its_namespaces_and_in_no_others(
    store: Any, publish: Any, kit: Any
) -> None:
    tenants = store.stores.tenants
    await tenants.set("acme-corp", Quotas())
    (version,) = await publish()
    (elsewhere,) = await publish(namespace="other", seeds=[2])
    await tenants.give_namespace("acme", "acme-corp")
    for namespace in ("acme", "other"):
        await require(store, namespace=namespace)
    added = await trust(store, namespace="tenant:acme-corp", comment="releases")
    assert (added.policy.namespace, added.key_id) == ("tenant:acme-corp", KEY.key_id)
    await sign(store, version.digest)
    assert (await resolve(store, "acme/ner:v1")).digest == version.digest
    assert [one.trusted for one in await signatures(store, version.digest)] == [True]
    async with kit.refused() as errors:
        await sign(store, elsewhere.digest)
    assert errors[0].reason is Reason.SIGNING_KEY_NOT_FOUND
    request = store_pb2.GetNamespacePolicyRequest(namespace="acme")
    found = await store.stub.GetNamespacePolicy(request)
    assert (len(found.policy.keys), [key.comment for key in found.tenant_policy.keys]) == (0, ["releases"])
    await tenants.give_namespace("acme", "default")
    async with kit.refused() as errors:
        await resolve(store, "acme/ner:v1")
    assert errors[0].reason is Reason.VERSION_UNSIGNED
    await tenants.give_namespace("acme", "acme-corp")
    await distrust(store, namespace="tenant:acme-corp")
    async with kit.refused() as errors:
        await resolve(store, "acme/ner:v1")
    assert errors[0].reason is Reason.VERSION_UNSIGNED


@pytest.mark.parametrize(
    ("scope", "reason"),
    [
        ("tenant:nobody", Reason.TENANT_NOT_FOUND),
        ("tenant:", Reason.INVALID_NAME),
        ("tenant:No Name", Reason.INVALID_NAME),
        ("user:acme", Reason.INVALID_NAME),
    ],
)
async def test_keys_are_of_namespaces_and_tenants_that_can_be(
    store: Any, kit: Any, scope: str, reason: Reason
) -> None:
    async with kit.refused() as errors:
        await trust(store, namespace=scope)
    assert errors[0].reason is reason
    async with kit.refused() as errors:
        await require(store, namespace="tenant:default")
    assert errors[0].reason is Reason.INVALID_NAME
