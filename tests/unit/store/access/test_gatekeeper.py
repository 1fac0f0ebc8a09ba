"""Every call passes the gate: who calls, and may it?"""

from typing import Any

import grpc.aio
import pytest

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import MeshError, StoreClient
from adaptermesh.core.errors import Code, Reason
from adaptermesh.core.roles import Role
from adaptermesh.core.version_state import VersionState
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.store.access.gatekeeper import GUARDS

SERVICES = (
    store_pb2.DESCRIPTOR.services_by_name["StoreService"],
    access_pb2.DESCRIPTOR.services_by_name["AccessService"],
)
METHODS = [method for service in SERVICES for method in service.methods]


def test_every_method_has_a_guard_and_every_guard_a_method() -> None:
    assert set(GUARDS) == {method.name for method in METHODS}


NO_KEYS = (
    "",
    "Basic abc",
    "Bearer ",
    "Bearer a b",
    "Bearer " + "a" * 5000,
    "Bearer amk_abcdefgh_" + "x" * 43,
)
STREAMS = {"DownloadFile", "FetchAdapter", "GetSnapshot", "WatchChanges", "VerifyBlobs"}


@pytest.mark.parametrize("authorization", NO_KEYS, ids=lambda text: text[:12].strip() or "none")
async def test_no_method_answers_without_a_key(guarded: Any, authorization: str) -> None:
    metadata = (("authorization", authorization),) if authorization else ()
    async with grpc.aio.insecure_channel(guarded.target) as untyped:
        channel: Any = untyped
        for method in METHODS:
            path = f"/{method.containing_service.full_name}/{method.name}"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if method.name in STREAMS:
                    await channel.unary_stream(path)(b"", metadata=metadata).read()
                elif method.name in {"UploadAdapter", "UploadPart"}:
                    await channel.stream_unary(path)(iter([b""]), metadata=metadata)
                else:
                    await channel.unary_unary(path)(b"", metadata=metadata)
            error = mesh_error_from(caught.value)
            assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.KEY_INVALID), method.name
            assert "xxx" not in error.message


async def test_a_reader_of_a_tenant_may_look_and_nothing_else(
    guarded: Any, key_for: Any, upload: Any, kit: Any
) -> None:
    publisher = await key_for("acme", Role.PUBLISHER)
    version = (await upload(publisher)).version
    reader = await key_for("acme", Role.READER)
    assert (await reader.resolve("acme-ns/ner:v1")).version.digest == version.digest
    assert [one.name for one in await reader.list_adapters()] == ["acme-ns/ner"]
    for refused in (
        upload(reader, seed=2),
        reader.set_alias("acme-ns/ner@prod", 1),
        reader.set_status("acme-ns/ner:v1", VersionState.DEPRECATED),
        reader.set_route("ner", "acme-ns/ner:v1", tenant="acme"),
        reader.collect_garbage(),
        reader.create_api_key([Role.READER]),
        reader.set_grant("acme-ns", "other", [Role.READER]),
        reader.audit(),
        reader.set_tenant("more"),
    ):
        with pytest.raises(MeshError) as caught:
            await refused
        assert (caught.value.code, caught.value.reason) == (Code.PERMISSION_DENIED, Reason.PERMISSION_DENIED)
        assert "may not" in caught.value.message


async def test_roles_allow_what_they_are_for(key_for: Any, upload: Any) -> None:
    publisher = await key_for("acme", Role.PUBLISHER)
    deployer = await key_for("acme", Role.DEPLOYER)
    admin = await key_for("acme", Role.ADMIN)
    await upload(publisher)
    with pytest.raises(MeshError, match="may not deploy"):
        await publisher.set_alias("acme-ns/ner@prod", 1)
    await deployer.set_alias("acme-ns/ner@prod", 1)
    with pytest.raises(MeshError, match="may not publish"):
        await upload(deployer, seed=2)
    await upload(publisher, seed=2)
    with pytest.raises(MeshError, match="may not administer"):
        await deployer.protect_alias("acme-ns/ner@prod", protected=True)
    await admin.protect_alias("acme-ns/ner@prod", protected=True)
    with pytest.raises(MeshError) as caught:
        await deployer.set_alias("acme-ns/ner@prod", 2)
    assert caught.value.reason is Reason.ALIAS_PROTECTED
    with pytest.raises(MeshError, match="may not administer"):
        await deployer.set_alias("acme-ns/ner@prod", 2, acknowledge_protection=True)
    move = await admin.set_alias("acme-ns/ner@prod", 2, acknowledge_protection=True)
    assert move.alias.version_number == 2
    await deployer.set_route("ner", "acme-ns/ner:v1", tenant="acme")
    for tenant in ("other", "*"):
        with pytest.raises(MeshError, match="may not deploy"):
            await deployer.set_route("ner", "acme-ns/ner:v1", tenant=tenant)


async def test_what_a_tenant_may_not_see_is_as_if_it_were_not_there(
    guarded: Any, key_for: Any, upload: Any, kit: Any
) -> None:
    owner, stranger = await key_for("acme", Role.ADMIN), await key_for("other", Role.ADMIN)
    version = (await upload(owner)).version
    await owner.set_alias("acme-ns/ner@prod", 1)
    assert await stranger.list_adapters() == []
    hidden = {}
    for what, refused in {
        "ref": stranger.resolve("acme-ns/ner@prod"),
        "missing": stranger.resolve("acme-ns/missing@prod"),
        "alias": stranger.set_alias("acme-ns/ner@prod", 1),
        "upload": upload(stranger, seed=2),
        "history": stranger.alias_history("acme-ns/ner@prod"),
        "versions": stranger.list_versions("acme-ns/ner"),
        "digest": stranger.resolve_digest(version.digest),
        "policy": stranger.namespace_policy("acme-ns"),
        "route": stranger.set_route("x", "acme-ns/ner@prod", tenant="other"),
    }.items():
        with pytest.raises(MeshError) as caught:
            await refused
        hidden[what] = caught.value
    assert {error.code for error in hidden.values()} == {Code.NOT_FOUND}
    assert "ner" not in hidden["digest"].message
    assert hidden["ref"].message == hidden["missing"].message.replace("missing", "ner")
    assert hidden["digest"].reason is Reason.VERSION_NOT_FOUND


async def test_a_grant_opens_one_adapter_or_all_to_a_tenant_or_to_everybody(
    key_for: Any, upload: Any
) -> None:
    owner = await key_for("acme", Role.ADMIN)
    stranger, third = await key_for("other", Role.ADMIN), await key_for("default", Role.READER)
    await upload(owner)
    await upload(owner, "acme-ns/law")
    await owner.set_grant("acme-ns", "other", [Role.READER], name="ner")
    assert [one.name for one in await stranger.list_adapters()] == ["acme-ns/ner"]
    await stranger.resolve("acme-ns/ner:v1")
    with pytest.raises(MeshError, match="does not exist"):
        await stranger.resolve("acme-ns/law:v1")
    with pytest.raises(MeshError, match="may not publish"):
        await upload(stranger, seed=2)
    assert await third.list_adapters() == []
    await owner.set_grant("acme-ns", "*", [Role.READER])
    assert len(await third.list_adapters()) == len(await stranger.list_adapters()) == 2
    await owner.set_grant("acme-ns", "other", [Role.PUBLISHER])
    assert (await upload(stranger, seed=2)).created
    # A key needs the role, too: a reader's stays one.
    reader = await key_for("other", Role.READER)
    with pytest.raises(MeshError, match="may not publish"):
        await upload(reader, seed=3)
    assert {grant.grantee for grant in await owner.list_grants(namespace="acme-ns")} == {"*", "other"}
    assert [grant.subject for grant in await stranger.list_grants(grantee="other")] == [
        "acme-ns/*",
        "acme-ns/ner",
    ]
    for name, grantee in (("", "*"), ("", "other"), ("ner", "other")):
        await owner.delete_grant("acme-ns", grantee, name=name)
    assert await stranger.list_adapters() == []
    with pytest.raises(MeshError) as caught:
        await owner.delete_grant("acme-ns", "other")
    assert caught.value.reason is Reason.GRANT_NOT_FOUND


async def test_a_key_is_good_in_its_namespaces_only(key_for: Any, upload: Any) -> None:
    everywhere = await key_for("acme", Role.ADMIN)
    await upload(everywhere, "one/ner")
    await upload(everywhere, "two/ner", seed=2)
    narrow = await key_for("acme", Role.ADMIN, namespaces=["one"])
    assert [one.newest.namespace for one in await narrow.list_adapters()] == ["one"]
    with pytest.raises(MeshError, match="does not exist"):
        await narrow.resolve("two/ner:v1")
    assert [one.name for one in await narrow.list_namespaces()] == ["one"]
    with pytest.raises(MeshError, match="may not administer"):
        await narrow.create_api_key([Role.ADMIN])
    with pytest.raises(MeshError, match="may not administer"):
        await narrow.create_api_key([Role.ADMIN], namespaces=["one", "two"])
    made = await narrow.create_api_key([Role.READER], namespaces=["one"])
    assert made.key.namespaces == ("one",)


async def test_only_operators_see_the_whole_mesh(root: StoreClient, key_for: Any, upload: Any) -> None:
    admin, watcher = await key_for("acme", Role.ADMIN), await key_for("*", Role.READER)
    await upload(admin)
    with pytest.raises(MeshError, match="may not administer in the whole mesh"):
        await admin.set_tenant("more")
    with pytest.raises(MeshError, match="may not administer"):
        await admin.create_api_key([Role.READER], tenant="*")
    assert len(await watcher.list_adapters()) == 1
    with pytest.raises(MeshError, match="may not publish"):
        await upload(watcher, seed=2)
    assert (await root.caller()).tenant == (await watcher.caller()).tenant == "*"


async def test_pages_of_one_tenant_are_none_of_another(guarded: Any, key_for: Any, upload: Any) -> None:
    owner, stranger = await key_for("acme", Role.ADMIN), await key_for("other", Role.ADMIN)
    for name in ("a", "b"):
        await upload(owner, f"acme-ns/{name}")
    request = store_pb2.ListAdaptersRequest(page_size=1)
    first = await owner._call(owner._stub.ListAdapters, request)  # no call shows its token
    request.page_token = first.next_page_token
    with pytest.raises(MeshError, match="page_token"):
        await stranger._call(stranger._stub.ListAdapters, request)
