from pathlib import Path

import pytest

from adaptermesh.client import Code, MeshError, Publication, Reason, RouteTarget, Search, StoreClient
from tests.unit.client.fake_services import FakeStore


@pytest.fixture
async def two_versions(store: StoreClient, adapter_folder: Path) -> None:
    for text in ("one", "two"):
        (adapter_folder / "README.md").write_text(text)
        await store.upload(adapter_folder, "acme/ner", Publication("tiny", task="ner"))


@pytest.mark.usefixtures("two_versions")
class TestAliases:
    async def test_an_alias_moves_and_rolls_back_with_a_history(self, store: StoreClient) -> None:
        await store.set_alias("acme/ner@prod", "v1", actor="me", comment="first")
        moved = await store.set_alias("acme/ner@prod", 2)
        assert (moved.alias.ref, moved.alias.version_number, moved.alias.generation) == (
            "acme/ner@prod",
            2,
            2,
        )
        back = await store.roll_back("acme/ner@prod", comment="worse")
        assert back.alias.version_number == 1
        assert back.feed_position > moved.feed_position
        history = await store.alias_history("acme/ner@prod")
        assert [(move.generation, move.version_number, move.comment) for move in history] == [
            (3, 1, "worse"),
            (2, 2, ""),
            (1, 1, "first"),
        ]

    async def test_an_alias_may_be_pointed_where_another_ref_points(self, store: StoreClient) -> None:
        await store.set_alias("acme/ner@canary", "v2")
        moved = await store.set_alias("acme/ner@prod", "acme/ner@canary")
        assert moved.alias.version_number == 2
        assert (await store.set_alias("acme/ner@prod", "acme/ner:v1")).alias.version_number == 1

    async def test_a_version_of_another_adapter_is_refused(self, store: StoreClient) -> None:
        with pytest.raises(MeshError, match="another adapter"):
            await store.set_alias("acme/ner@prod", "acme/other:v1")

    async def test_a_stale_generation_is_aborted(self, store: StoreClient) -> None:
        await store.set_alias("acme/ner@prod", "v1", expected_generation=0)
        with pytest.raises(MeshError) as caught:
            await store.set_alias("acme/ner@prod", "v2", expected_generation=0)
        assert (caught.value.code, caught.value.reason) == (Code.ABORTED, Reason.ALIAS_CONFLICT)
        assert caught.value.metadata["generation"] == "1"

    @pytest.mark.parametrize("ref", ["acme/ner", "acme/ner:v1", "acme/ner@sha256:" + "0" * 64])
    async def test_a_ref_without_an_alias_can_not_be_pointed(self, store: StoreClient, ref: str) -> None:
        with pytest.raises(MeshError, match="names no alias") as caught:
            await store.set_alias(ref, "v1")
        assert caught.value.reason is Reason.INVALID_REF

    async def test_a_ref_resolves_to_version_aliases_and_manifest(self, store: StoreClient) -> None:
        await store.set_alias("acme/ner@prod", "v2")
        resolved = await store.resolve("acme/ner@prod")
        assert resolved.version.ref == "acme/ner:v2"
        assert resolved.aliases == ("prod",)
        assert resolved.manifest == b'{"schema":1}'

    async def test_versions_are_listed_newest_first(self, store: StoreClient) -> None:
        assert [version.number for version in await store.list_versions("acme/ner")] == [2, 1]


async def test_lists_follow_every_page(store: StoreClient, adapter_folder: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await store.upload(adapter_folder, f"acme/{name}", Publication("tiny", task=name))
        await store.set_route(name, f"acme/{name}:v1")
    assert [adapter.name for adapter in await store.list_adapters()] == [f"acme/{name}" for name in "abcde"]
    assert [route.task for route in await store.list_routes()] == list("abcde")
    assert [adapter.name for adapter in await store.list_adapters("ACME/", task="b")] == ["acme/b"]


async def test_a_search_reads_pages_up_to_its_limit_and_counts_once(
    store: StoreClient, fake_store: FakeStore, adapter_folder: Path
) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await store.upload(adapter_folder, f"acme/{name}", Publication("tiny", task="one"))
    found = await store.search(Search(with_facets=True), limit=3)
    assert ([adapter.name for adapter in found.adapters], found.more) == (
        ["acme/a", "acme/b", "acme/c"],
        True,
    )
    assert found.facets == {"task": (("one", 2),)}
    assert [request.with_facets for request in fake_store.searches] == [True, False]
    every = await store.search(Search("acme"))
    assert (len(every.adapters), every.more, dict(every.facets)) == (5, False, {})
    with pytest.raises(MeshError, match="'size' is none of relevance, newest, date, name, downloads, score"):
        await store.search(Search(order="size"))


async def test_a_route_is_set_by_weights_and_removed(store: StoreClient) -> None:
    targets = [RouteTarget("acme/ner@prod", 95), RouteTarget("acme/ner@canary", 5, "canary")]
    change = await store.set_route("ner", targets, tenant="acme")
    assert change.route.targets == tuple(targets)
    assert change.route.generation == 1
    assert await store.list_routes(tenant="other") == []
    assert await store.delete_route("ner", tenant="acme") > change.feed_position
    with pytest.raises(MeshError) as caught:
        await store.delete_route("ner", tenant="acme")
    assert caught.value.reason is Reason.ROUTE_NOT_FOUND


async def test_base_models_are_listed(store: StoreClient) -> None:
    (base,) = await store.list_base_models()
    assert (base.model_id, base.num_layers) == ("tiny", 2)


async def test_an_unknown_ref_is_not_found_by_name(store: StoreClient) -> None:
    with pytest.raises(MeshError) as caught:
        await store.resolve("acme/nothing:v1")
    assert (caught.value.code, caught.value.metadata["name"]) == (Code.NOT_FOUND, "acme/nothing")


async def test_a_store_that_is_not_there_is_named(fake_store: FakeStore) -> None:
    async with StoreClient("127.0.0.1:1") as store:
        with pytest.raises(MeshError, match=r"nothing answers at 127\.0\.0\.1:1") as caught:
            await store.list_routes()
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
