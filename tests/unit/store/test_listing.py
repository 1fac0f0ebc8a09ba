from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code


async def found(store: Any, page_size: int = 0, **fields: Any) -> list[str]:
    names: list[str] = []
    token = ""
    while True:
        request = store_pb2.ListAdaptersRequest(page_size=page_size, page_token=token, **fields)
        page = await store.stub.ListAdapters(request)
        names += [f"{item.newest.namespace}/{item.newest.name}" for item in page.adapters]
        token = page.next_page_token
        if not token:
            return names


@pytest.fixture
async def library(store: Any, publish: Any, kit: Any) -> Any:
    await publish("ner", seeds=(1, 2), task="financial-ner", tags=["finance", "english"])
    await publish("sql", task="text-to-sql", tags=["code"])
    await publish("style", namespace="beta", task="style", tags=["english"])
    other = kit.base_model("other-llama", "others")
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=other))
    await publish("percent", namespace="beta", base_model="other-llama")
    return store


async def test_adapters_are_found_by_every_condition(library: Any, kit: Any) -> None:
    everything = ["acme/ner", "acme/sql", "beta/percent", "beta/style"]
    other = kit.base_model("other-llama", "others")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, everything),
        ({"query": "NER"}, ["acme/ner"]),
        ({"query": "e/s"}, ["acme/sql"]),
        ({"query": "%"}, []),
        ({"query": "_"}, []),
        ({"query": "st"}, ["beta/style"]),
        ({"namespace": "beta"}, ["beta/percent", "beta/style"]),
        ({"task": "financial-ner"}, ["acme/ner"]),
        ({"task": "financial"}, []),
        ({"base_model": "tiny-llama"}, ["acme/ner", "acme/sql", "beta/style"]),
        ({"base_model": other.digest}, ["beta/percent"]),
        ({"tags": ["english"]}, ["acme/ner", "beta/style"]),
        ({"tags": ["english", "finance"]}, ["acme/ner"]),
        ({"tags": ["english", "english"]}, ["acme/ner", "beta/style"]),
        ({"tags": ["eng"]}, []),
        ({"query": "s", "tags": ["english"], "task": "style"}, ["beta/style"]),
    ]
    for fields, expected in cases:
        assert await found(library, **fields) == expected, fields
        assert await found(library, page_size=1, **fields) == expected, fields


async def test_conditions_hold_for_the_newest_version(library: Any, publish: Any) -> None:
    await publish("ner", seeds=(3,), task="general-ner", tags=["german"])
    assert await found(library, task="financial-ner") == []
    assert await found(library, tags=["finance"]) == []
    assert await found(library, task="general-ner", tags=["german"]) == ["acme/ner"]


async def test_a_summary_has_the_newest_version_and_all_aliases(library: Any) -> None:
    for alias, number in (("prod", 1), ("canary", 2), ("prod", 2)):
        request = store_pb2.SetAliasRequest(namespace="acme", name="ner", alias=alias, version_number=number)
        await library.stub.SetAlias(request)
    page = await library.stub.ListAdapters(store_pb2.ListAdaptersRequest(query="ner"))
    (summary,) = page.adapters
    assert (summary.version_count, summary.newest.number) == (2, 2)
    assert [(a.alias, a.version_number, a.generation) for a in summary.aliases] == [
        ("canary", 2, 1),
        ("prod", 2, 2),
    ]


async def test_pages_of_adapters_stay_in_place_under_writes(store: Any, publish: Any) -> None:
    for name in ("b", "d", "f"):
        await publish(name)
    first = await store.stub.ListAdapters(store_pb2.ListAdaptersRequest(page_size=2))
    for name in ("a", "c", "e", "g"):
        await publish(name)
    await publish("d", seeds=(2,))
    request = store_pb2.ListAdaptersRequest(page_size=9, page_token=first.next_page_token)
    second = await store.stub.ListAdapters(request)
    names = [[item.newest.name for item in page.adapters] for page in (first, second)]
    assert names == [["b", "d"], ["e", "f", "g"]]


async def test_versions_are_listed_newest_first_in_stable_pages(store: Any, publish: Any) -> None:
    await publish(seeds=(1, 2, 3))

    async def page(token: str = "") -> Any:
        request = store_pb2.ListVersionsRequest(namespace="acme", name="ner", page_size=2, page_token=token)
        return await store.stub.ListVersions(request)

    first = await page()
    await publish(seeds=(4,))
    second = await page(first.next_page_token)
    assert [[v.number for v in p.versions] for p in (first, second)] == [[3, 2], [1]]


@pytest.mark.parametrize("token", ["x", "e30=", "W10=", "WyJhIiwgImIiXQ==", "é", "bm90IGpzb24="])
async def test_a_bad_page_token_is_refused(library: Any, kit: Any, token: str) -> None:
    calls = [
        library.stub.ListAdapters(store_pb2.ListAdaptersRequest(page_token=token)),
        library.stub.ListRoutes(store_pb2.ListRoutesRequest(page_token=token)),
        library.stub.ListBaseModels(store_pb2.ListBaseModelsRequest(page_token=token)),
        library.stub.ListVersions(
            store_pb2.ListVersionsRequest(namespace="acme", name="ner", page_token=token)
        ),
    ]
    for call in calls:
        async with kit.refused() as errors:
            await call
        assert errors[0].code is Code.INVALID_ARGUMENT
        assert errors[0].metadata == {"field": "page_token"}


async def test_a_page_token_holds_for_its_own_list_and_conditions_only(library: Any, kit: Any) -> None:
    page = await library.stub.ListAdapters(store_pb2.ListAdaptersRequest(page_size=1))
    async with kit.refused() as errors:
        await library.stub.ListAdapters(
            store_pb2.ListAdaptersRequest(page_token=page.next_page_token, task="style")
        )
    assert errors[0].metadata == {"field": "page_token"}
    async with kit.refused():
        await library.stub.ListRoutes(store_pb2.ListRoutesRequest(page_token=page.next_page_token))


@pytest.mark.parametrize("size", [-1, 1001])
async def test_a_page_size_out_of_range_is_refused(library: Any, kit: Any, size: int) -> None:
    async with kit.refused() as errors:
        await library.stub.ListAdapters(store_pb2.ListAdaptersRequest(page_size=size))
    assert errors[0].metadata == {"field": "page_size"}


async def test_pages_of_large_items_are_short_and_still_complete(store: Any, kit: Any) -> None:
    for number in range(20):
        base = kit.base_model("large", str(number))
        base.config_json = base.config_json[:-1] + " " * 60_000 + "}"
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    digests, token, pages = [], "", 0
    while pages == 0 or token:
        page = await store.stub.ListBaseModels(store_pb2.ListBaseModelsRequest(page_token=token))
        assert page.ByteSize() < 2**20
        digests += [base.digest for base in page.base_models]
        token, pages = page.next_page_token, pages + 1
    assert len(digests) == len(set(digests)) == 21
    assert pages > 1


async def test_a_long_condition_is_refused(library: Any, kit: Any) -> None:
    async with kit.refused() as errors:
        await library.stub.ListAdapters(store_pb2.ListAdaptersRequest(query="x" * 257))
    assert errors[0].metadata == {"field": "query"}
