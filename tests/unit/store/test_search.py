"""Search over adapters: conditions, orders, pages that stay in place, facets."""

import asyncio
import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason
from adaptermesh.store import search

EVERYTHING = ["beta/percent", "beta/style", "acme/sql", "acme/financial-ner"]


async def found(store: Any, page_size: int = 0, **fields: Any) -> list[str]:
    names: list[str] = []
    token = ""
    while True:
        request = store_pb2.SearchAdaptersRequest(page_size=page_size, page_token=token, **fields)
        page = await store.stub.SearchAdapters(request)
        names += [f"{item.newest.namespace}/{item.newest.name}" for item in page.adapters]
        token = page.next_page_token
        if not token:
            return names


@pytest.fixture
async def library(store: Any, publish: Any, kit: Any) -> Any:
    card = b"# Entities\n\nFinds companies and amounts in invoices. \xc3\x9cbersicht."
    await publish(
        "financial-ner",
        seeds=(1, 2),
        task="financial-ner",
        tags=["finance", "english"],
        description="Named entities in reports",
        card=card,
    )
    await publish("sql", task="text-to-sql", tags=["code"], description="Questions to queries")
    await publish("style", namespace="beta", task="style", tags=["english"], license="apache-2.0")
    other = kit.base_model("other-llama", "others")
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=other))
    await publish("percent", namespace="beta", base_model="other-llama", license="")
    return store


async def test_adapters_are_found_by_words_and_by_every_condition(library: Any, kit: Any) -> None:
    other = kit.base_model("other-llama", "others")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, EVERYTHING),
        ({"text": "ner"}, ["acme/financial-ner"]),
        ({"text": "FINANCIAL"}, ["acme/financial-ner"]),
        ({"text": "acme/financial-ner"}, ["acme/financial-ner"]),
        ({"text": "fin"}, ["acme/financial-ner"]),
        ({"text": "inancial"}, []),
        ({"text": "entities invoic"}, ["acme/financial-ner"]),
        ({"text": "entities code"}, []),
        ({"text": "queries"}, ["acme/sql"]),
        ({"text": "\u00dcbersicht"}, ["acme/financial-ner"]),
        ({"text": "ubersicht"}, ["acme/financial-ner"]),
        ({"namespace": "beta"}, ["beta/percent", "beta/style"]),
        ({"task": "style"}, ["beta/style"]),
        ({"task": "sty"}, []),
        ({"kind": "lora"}, EVERYTHING),
        ({"kind": "ia3"}, []),
        ({"license": "apache-2.0"}, ["beta/style"]),
        ({"base_model": "tiny-llama"}, EVERYTHING[1:]),
        ({"base_model": other.digest}, ["beta/percent"]),
        ({"tags": ["english"]}, ["beta/style", "acme/financial-ner"]),
        ({"tags": ["english", "finance"]}, ["acme/financial-ner"]),
        ({"text": "acme", "tags": ["code"], "task": "text-to-sql"}, ["acme/sql"]),
        ({"order": store_pb2.SEARCH_ORDER_NAME}, sorted(EVERYTHING)),
        ({"text": "english", "order": store_pb2.SEARCH_ORDER_NEWEST}, ["beta/style", "acme/financial-ner"]),
        ({"text": "english", "order": store_pb2.SEARCH_ORDER_NAME}, ["acme/financial-ner", "beta/style"]),
        ({"order": store_pb2.SEARCH_ORDER_RELEVANCE}, EVERYTHING),
    ]
    for fields, expected in cases:
        assert await found(library, **fields) == expected, fields
        assert await found(library, page_size=1, **fields) == expected, fields


async def test_a_name_counts_more_than_a_card(store: Any, publish: Any) -> None:
    await publish("one", card=b"# Poems\n\nIt has read poems.")
    await publish("poems")
    await publish("two", tags=["poems"])
    assert await found(store, text="poems") == ["acme/poems", "acme/two", "acme/one"]


async def test_conditions_and_words_are_of_the_newest_version(library: Any, publish: Any) -> None:
    await publish(
        "financial-ner", seeds=(3,), task="general-ner", tags=["german"], description="", card=b"# New"
    )
    assert await found(library, task="financial-ner") == []
    assert await found(library, tags=["finance"]) == []
    assert await found(library, text="invoices") == []
    assert await found(library, text="german", task="general-ner") == ["acme/financial-ner"]
    assert (await found(library))[0] == "acme/financial-ner"


@pytest.mark.parametrize("order", ["NEWEST", "NAME", "RELEVANCE"])
async def test_pages_stay_in_place_under_writes(store: Any, publish: Any, order: str) -> None:
    for name in "abcdef":
        await publish(name, tags=["word"])
    request = store_pb2.SearchAdaptersRequest(
        text="word", order=store_pb2.SearchOrder.Value(f"SEARCH_ORDER_{order}"), page_size=2
    )
    names: list[str] = []
    for turn in range(10):
        page = await store.stub.SearchAdapters(request)
        names += [item.newest.name for item in page.adapters]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
        # One that is new in front or behind, and one that moves.
        await publish(f"new{turn}", tags=["word"])
        await publish("a" if order == "NEWEST" else "f", seeds=(turn + 5,), tags=["word"])
    assert len(names) == len(set(names)) or order == "NEWEST"
    kept = set("bcdef") if order == "NEWEST" else set("abcdef")
    assert kept <= set(names)
    assert [name for name in names if name in kept].count("c") == 1


async def test_facets_count_what_matches(library: Any) -> None:
    async def facets(**fields: Any) -> dict[str, dict[str, int]]:
        request = store_pb2.SearchAdaptersRequest(with_facets=True, page_size=1, **fields)
        page = await library.stub.SearchAdapters(request)
        assert not page.facets_capped
        return {facet.field: {one.value: one.count for one in facet.values} for facet in page.facets}

    assert await facets() == {
        "base_model": {"tiny-llama": 3, "other-llama": 1},
        "task": {"financial-ner": 1, "style": 1, "text-to-sql": 1, "": 1},
        "kind": {"lora": 4},
        "license": {"mit": 2, "apache-2.0": 1, "": 1},
        "tags": {"english": 2, "finance": 1, "code": 1},
        "language": {},
        "tenant": {"default": 4},
    }
    found = await facets(text="english", namespace="beta")
    assert (found["task"], found["tags"]) == ({"style": 1}, {"english": 1})
    page = await library.stub.SearchAdapters(store_pb2.SearchAdaptersRequest())
    assert list(page.facets) == []


def card(languages: str = "", *results: tuple[str, str, float]) -> bytes:
    """With languages, and results of task, metric and value."""
    lines = ["---", f"language: [{languages}]", "model-index:", "- name: m", "  results:"]
    for task, metric, value in results:
        lines += [f"  - task: {{type: {task}}}", f"    metrics: [{{type: {metric}, value: {value}}}]"]
    return "\n".join([*lines, "---", "# A card"]).encode()


@pytest.fixture
async def scored(store: Any, publish: Any) -> Any:
    await publish("a", card=card("en, de", ("ner", "accuracy", 0.5), ("qa", "accuracy", 0.9)), tags=["x"])
    await publish("b", card=card("en", ("qa", "accuracy", 0.7), ("qa", "loss", 1.5)), tags=["x"])
    await publish("c", card=card("fr", ("ner", "loss", 0.5)))
    await publish("d")
    return store


async def test_adapters_come_in_order_of_a_score_of_their_cards(scored: Any, publish: Any) -> None:
    by_score = {"order": store_pb2.SEARCH_ORDER_SCORE}
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["acme/b", "acme/a"]),
        ({"score_metric": "accuracy"}, ["acme/b", "acme/a"]),
        ({"score_metric": "accuracy", "lowest_score_first": True}, ["acme/a", "acme/b"]),
        ({"score_metric": "qa/accuracy"}, ["acme/a", "acme/b"]),
        ({"score_metric": "loss", "lowest_score_first": True}, ["acme/c", "acme/b"]),
        ({"score_metric": "bleu"}, []),
        ({"score_metric": "loss", "language": "fr"}, ["acme/c"]),
        ({"text": "a"}, ["acme/b", "acme/a"]),
        ({"text": "b"}, ["acme/b"]),
    ]
    for fields, expected in cases:
        for page_size in (0, 1):
            assert await found(scored, page_size, **by_score, **fields) == expected, fields
    await publish("b", seeds=(2,), card=card("en", ("qa", "accuracy", 0.1)))
    assert await found(scored, **by_score) == ["acme/a", "acme/b"]


async def test_adapters_are_found_by_the_languages_of_their_cards(scored: Any) -> None:
    assert await found(scored, language="en") == ["acme/b", "acme/a"]
    assert await found(scored, page_size=1, language="en") == ["acme/b", "acme/a"]
    assert await found(scored, language="de", tags=["x"]) == ["acme/a"]
    assert await found(scored, language="fr", tags=["x"]) == []
    assert await found(scored, language="en", text="b") == ["acme/b"]
    request = store_pb2.SearchAdaptersRequest(with_facets=True, text="card")
    page = await scored.stub.SearchAdapters(request)
    (languages,) = (facet for facet in page.facets if facet.field == "language")
    assert [(one.value, one.count) for one in languages.values] == [("en", 2), ("de", 1), ("fr", 1)]


async def test_adapters_come_in_order_of_their_downloads_on_pages_that_stay(store: Any, publish: Any) -> None:
    versions = {name: (await publish(name, tags=["word"]))[0] for name in "abcde"}

    async def downloaded(**counts: int) -> None:
        for name, count in counts.items():
            request = store_pb2.FetchAdapterRequest(digest=versions[name].digest)
            for _ in range(count):
                async for _ in store.stub.FetchAdapter(request):
                    pass
        await store.stores.download_counts.flush()

    await downloaded(a=3, b=5, c=1)
    order = store_pb2.SEARCH_ORDER_DOWNLOADS
    expected = ["acme/b", "acme/a", "acme/c", "acme/e", "acme/d"]
    assert await found(store, order=order) == expected
    assert await found(store, order=order, text="word", tags=["word"]) == expected
    request = store_pb2.SearchAdaptersRequest(order=order, page_size=2)
    first = await store.stub.SearchAdapters(request)
    assert [item.download_count for item in first.adapters] == [5, 3]
    # Between two pages the last becomes the first, and a new one comes.
    await downloaded(d=9, a=1)
    await publish("f")
    request.page_token = first.next_page_token
    second = await store.stub.SearchAdapters(request)
    request.page_token = second.next_page_token
    third = await store.stub.SearchAdapters(request)
    names = [item.newest.name for page in (first, second, third) for item in page.adapters]
    assert (names, third.next_page_token) == (list("baced"), "")
    assert (await found(store, order=order))[0] == "acme/d"


async def test_of_very_many_matches_the_newest_are_ranked_and_the_newest_names(
    store: Any, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MAX_RANKED", 3)
    await publish("poems")
    await publish("lost", card=b"# Poems")
    for name in ("x", "y", "z"):
        await publish(name, card=b"# Poems")
    assert set(await found(store, text="poems")) == {"acme/poems", "acme/x", "acme/y", "acme/z"}
    assert (await found(store, text="poems"))[0] == "acme/poems"
    # What conditions leave is what counts.
    await publish("old", card=b"# Poems", task="old")
    for name in "uvw":
        await publish(name, card=b"# Poems")
    assert await found(store, text="poems", task="old") == ["acme/old"]
    assert len(await found(store, text="poems", order=store_pb2.SEARCH_ORDER_NEWEST)) == 9


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "!?"}, "text"),
        ({"language": "x" * 300}, "language"),
        ({"score_metric": "x" * 300}, "score_metric"),
        ({"text": " ".join("abcdefghijklmnopq")}, "text"),
        ({"text": "a" * 300}, "text"),
        ({"task": "x" * 300}, "task"),
        ({"tags": [str(n) for n in range(33)]}, "tags"),
        ({"order": 9}, "order"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
    ],
)
async def test_what_can_not_be_asked_is_refused_with_the_field(
    library: Any, kit: Any, fields: dict[str, Any], field: str
) -> None:
    async with kit.refused() as errors:
        await library.stub.SearchAdapters(store_pb2.SearchAdaptersRequest(**fields))
    [error] = errors
    assert (error.code, error.reason, error.metadata["field"]) == (
        Code.INVALID_ARGUMENT,
        Reason.INVALID_FIELD,
        field,
    )


async def test_a_token_is_of_its_own_search(store: Any, publish: Any, kit: Any) -> None:
    for name in "abc":
        await publish(name, tags=["word"])
    first = await store.stub.SearchAdapters(store_pb2.SearchAdaptersRequest(text="word", page_size=1))
    request = store_pb2.SearchAdaptersRequest(text="wor", page_size=1, page_token=first.next_page_token)
    async with kit.refused() as errors:
        await store.stub.SearchAdapters(request)
    assert errors[0].metadata["field"] == "page_token"


@pytest.mark.parametrize(
    ("ids", "names"),
    [((2**31 - 1, 1), ["a"]), ((2**31,), None), ((), None), ((1,) * 1001, None), (("x",), None)],
)
async def test_a_forged_token_is_refused_or_finds_what_is_there(
    store: Any, publish: Any, kit: Any, ids: tuple[Any, ...], names: list[str] | None
) -> None:
    for name in "ab":
        await publish(name, tags=["word"])
    first = await store.stub.SearchAdapters(store_pb2.SearchAdaptersRequest(text="word", page_size=1))
    scope, _ = json.loads(base64.urlsafe_b64decode(first.next_page_token))
    packed = b"".join(one.encode() if isinstance(one, str) else one.to_bytes(4, "big") for one in ids)
    token = base64.urlsafe_b64encode(json.dumps([scope, base64.b85encode(packed).decode()]).encode()).decode()
    request = store_pb2.SearchAdaptersRequest(text="word", page_token=token)
    if names is None:
        async with kit.refused() as errors:
            await store.stub.SearchAdapters(request)
        assert errors[0].metadata["field"] == "page_token"
    else:
        page = await store.stub.SearchAdapters(request)
        assert [item.newest.name for item in page.adapters] == names


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40) | st.text(alphabet="\"'*():^-+{}[]&|!<>~ aner", max_size=20))
async def test_any_text_is_words_or_refused(library: Any, text: str) -> None:
    async with asyncio.timeout(10):
        try:
            assert set(await found(library, text=text)) <= set(EVERYTHING)
        except Exception as error:  # noqa: BLE001 (looked at)
            assert "INVALID_ARGUMENT" in str(error)
