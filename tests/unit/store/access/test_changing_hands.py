"""Rights that end while something is under way, and namespaces that change hands."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import MeshError, StoreClient
from adaptermesh.core.errors import Code, Reason
from adaptermesh.core.roles import Role
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.testing.polling import eventually


async def test_an_upload_that_began_in_a_free_namespace_is_not_published_into_another_tenants(
    root: StoreClient, key_for: Any, upload: Any, kit: Any, guarded: Any
) -> None:
    slow = await key_for("other", Role.PUBLISHER)
    files = kit.make_files(7)
    requests = list(kit.make_requests(kit.make_header(files, namespace="acme-ns", name="bot"), files))
    go_on = asyncio.Event()

    async def messages() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
        for request in requests[:2]:
            yield request
        await go_on.wait()
        for request in requests[2:]:
            yield request

    sending = asyncio.ensure_future(slow._stub.UploadAdapter(messages()))  # in two halves
    await kit.until(lambda: guarded.stores.uploads.active == 1)
    owner = await key_for("acme", Role.ADMIN)
    await upload(owner, "acme-ns/bot")
    go_on.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sending
    assert mesh_error_from(caught.value).code is Code.NOT_FOUND
    assert [version.number for version in await owner.list_versions("acme-ns/bot")] == [1]


async def test_what_a_former_owner_granted_ends_with_its_ownership(
    root: StoreClient, key_for: Any, upload: Any
) -> None:
    former, owner = await key_for("acme", Role.ADMIN), await key_for("other", Role.ADMIN)
    await upload(former)
    await former.set_grant("acme-ns", "acme", [Role.ADMIN])
    key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    await former.add_signing_key("acme-ns", key)
    await root.set_namespace("acme-ns", "other")
    with pytest.raises(MeshError, match="does not exist"):
        await former.resolve("acme-ns/ner:v1")
    assert await owner.list_grants(namespace="acme-ns") == []
    assert (await owner.namespace_policy("acme-ns")).keys == ()
    actions = [entry.action for entry in await root.audit(limit=3)]
    assert actions == ["namespace_set", "namespace_policy_set", "grant_deleted"]


async def test_others_neither_block_a_removal_nor_are_they_named(key_for: Any, upload: Any) -> None:
    owner, partner = await key_for("acme", Role.ADMIN), await key_for("other", Role.ADMIN)
    version = (await upload(owner)).version
    await owner.set_grant("acme-ns", "other", [Role.READER])
    await partner.set_route("secret-task", version.ref, tenant="other")
    await owner.set_route("ours", version.ref, tenant="acme")
    with pytest.raises(MeshError) as caught:
        await owner.delete_version(version)
    assert caught.value.reason is Reason.VERSION_IN_USE
    assert ("acme/ours" in caught.value.message, "secret-task" in f"{caught.value!r}") == (True, False)
    await owner.delete_route("ours", tenant="acme")
    await owner.delete_version(version, reason="private words")
    await owner.delete_grant("acme-ns", "other")
    # Its digest says no more to who may not see it than it did before.
    with pytest.raises(MeshError) as caught:
        await partner.resolve_digest(version.digest)
    assert caught.value.reason is Reason.VERSION_NOT_FOUND
    with pytest.raises(MeshError) as caught:
        await owner.resolve_digest(version.digest)
    assert caught.value.reason is Reason.VERSION_DELETED


async def test_a_watch_ends_with_its_key(
    root: StoreClient, connect: Any, guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermesh.store.feed_servicer._KEY_SECONDS", 0.0)
    made = await root.create_api_key([Role.READER], tenant="*")
    watcher = connect(made.secret)
    place = await watcher.feed_head()
    request = store_pb2.WatchChangesRequest(feed_id=place.feed_id, after_position=place.position)
    call = watcher._stub.WatchChanges(request)  # the client's own begins again
    assert (await call.read()).head_position == place.position
    await root.revoke_api_key(made.key.key_id)

    async def ended() -> bool:
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            assert mesh_error_from(error).reason is Reason.KEY_INVALID
            return True
        return False

    await eventually(ended, within=20)


async def test_one_tenant_does_not_take_every_place_of_uploads(
    key_for: Any, upload: Any, kit: Any, guarded: Any
) -> None:
    greedy, other = await key_for("acme", Role.PUBLISHER), await key_for("other", Role.PUBLISHER)
    files = kit.make_files(7)
    stop = asyncio.Event()

    async def hold(number: int) -> None:
        header = kit.make_header(files, namespace="acme-ns", name=f"held-{number}")

        async def messages() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
            yield store_pb2.UploadAdapterRequest(header=header)
            await stop.wait()

        await greedy._stub.UploadAdapter(messages())  # never ends by itself

    held = [asyncio.ensure_future(hold(number)) for number in range(4)]
    await kit.until(lambda: guarded.stores.uploads.active == 4)
    with pytest.raises(MeshError) as caught:
        await upload(greedy)
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    assert (await upload(other, "other-ns/ner")).created
    stop.set()
    await asyncio.gather(*held, return_exceptions=True)
    assert (await upload(greedy)).created


async def test_guesses_at_one_key_keep_nobody_else_from_theirs(root: StoreClient, connect: Any) -> None:
    victim = await root.create_api_key([Role.READER], tenant="acme")
    mine = await root.create_api_key([Role.READER], tenant="other")
    guesses = [connect(f"{victim.key.key_id}_{'x' * 42}{number}") for number in range(10)]
    results = await asyncio.gather(
        connect(mine.secret).caller(), *(guess.caller() for guess in guesses), return_exceptions=True
    )
    assert getattr(results[0], "tenant", results[0]) == "other"
    reasons = {getattr(result, "reason", None) for result in results[1:]}
    assert reasons <= {Reason.KEY_INVALID, Reason.OVERLOADED}


async def test_a_key_of_some_namespaces_is_none_for_routes_and_tenants(
    key_for: Any, root: StoreClient
) -> None:
    narrow, operator = (
        await key_for("acme", Role.ADMIN, namespaces=["one"]),
        await key_for("*", Role.READER, namespaces=["one"]),
    )
    for client in (narrow, operator):
        with pytest.raises(MeshError, match="may not read"):
            await client.list_routes()
    assert await operator.list_tenants() == []
    with pytest.raises(MeshError, match="may not deploy"):
        await narrow.set_route("x", "one/ner:v1", tenant="acme")
