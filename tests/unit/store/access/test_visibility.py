"""Lists and searches show a caller what it may see, whatever token or digest it comes with."""

import base64
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import MeshError, Search, StoreClient
from adaptermesh.core.roles import Role


@pytest.fixture
async def library(key_for: Any, upload: Any) -> tuple[StoreClient, StoreClient]:
    """Of two tenants: the one has two adapters, of which the other may see one."""
    owner, stranger = await key_for("acme", Role.ADMIN), await key_for("other", Role.ADMIN)
    for number, name in enumerate(("hidden", "shown")):
        await upload(owner, f"acme-ns/{name}", seed=number + 1)
    await upload(stranger, "other-ns/mine", seed=3)
    await owner.set_grant("acme-ns", "other", [Role.READER], name="shown")
    return owner, stranger


def names(found: Any) -> list[str]:
    return sorted(adapter.name for adapter in found.adapters)


@pytest.mark.parametrize(
    "query",
    [
        Search(),
        Search("small"),
        Search("small", order="newest"),
        Search(order="name"),
        Search(order="downloads"),
        Search(license="mit"),
        Search("small", kind="lora"),
    ],
    ids=lambda query: f"{query.text}-{query.order}-{query.license}{query.kind}",
)
async def test_a_search_finds_what_may_be_seen_in_every_order(
    library: tuple[StoreClient, StoreClient], query: Search
) -> None:
    owner, stranger = library
    assert names(await owner.search(query)) == ["acme-ns/hidden", "acme-ns/shown"]
    assert names(await stranger.search(query)) == ["acme-ns/shown", "other-ns/mine"]


async def test_facets_count_what_may_be_seen_and_tell_the_tenants(
    library: tuple[StoreClient, StoreClient], root: StoreClient
) -> None:
    _, stranger = library
    found = await stranger.search(Search("small", with_facets=True))
    facets = {facet: dict(values) for facet, values in found.facets.items()}
    assert facets["tenant"] == {"acme": 1, "other": 1}
    assert facets["kind"] == {"lora": 2}
    assert names(await stranger.search(Search(tenant="acme"))) == ["acme-ns/shown"]
    assert names(await root.search(Search(tenant="acme"))) == ["acme-ns/hidden", "acme-ns/shown"]


async def test_a_token_that_names_what_may_not_be_seen_shows_nothing(
    library: tuple[StoreClient, StoreClient], guarded: Any
) -> None:
    _, stranger = library
    request = store_pb2.SearchAdaptersRequest(text="small", page_size=1)
    first = await stranger._call(stranger._stub.SearchAdapters, request)  # no call has a token
    forged = bytearray(base64.urlsafe_b64decode(first.next_page_token))
    start = forged.index(b'","') + 3
    everything = base64.b85encode(b"".join(number.to_bytes(4, "big") for number in (1, 2, 3)))
    forged[start : forged.rindex(b'"')] = everything.replace(b'"', b"")
    request.page_token = base64.urlsafe_b64encode(bytes(forged)).decode()
    request.page_size = 10
    page = await stranger._call(stranger._stub.SearchAdapters, request)
    assert {summary.newest.name for summary in page.adapters} <= {"shown", "mine"}


async def test_downloads_of_what_may_not_be_seen_are_not_counted_for_a_stranger(
    library: tuple[StoreClient, StoreClient], guarded: Any
) -> None:
    owner, stranger = library
    digest = (await owner.resolve("acme-ns/hidden:v1")).version.digest
    async for _ in owner._stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=digest)):
        pass
    await guarded.stores.download_counts.flush()
    assert await owner.download_counts([digest]) == [1]
    assert await stranger.download_counts([digest]) == [0]
    with pytest.raises(MeshError, match="does not exist"):
        await stranger.resolve_digest(digest)


async def test_a_removed_version_is_counted_out_and_on_record(
    library: tuple[StoreClient, StoreClient],
) -> None:
    owner, stranger = library
    before = (await owner.list_namespaces())[0].usage
    assert before is not None
    version = (await owner.resolve("acme-ns/hidden:v1")).version
    with pytest.raises(MeshError, match="may not administer"):
        await stranger.delete_version((await stranger.resolve("acme-ns/shown:v1")).version)
    await owner.delete_version(version, reason="wrong data", actor="ada")
    after = (await owner.list_namespaces())[0].usage
    assert after is not None
    uploaded = sum(file.size_bytes for file in version.source_files)
    assert (before.versions - after.versions, before.bytes - after.bytes) == (
        1,
        version.size_bytes + uploaded,
    )
    newest = (await owner.audit(limit=1))[0]
    assert (newest.action, newest.subject, newest.actor) == ("version_deleted", version.ref, "ada")
