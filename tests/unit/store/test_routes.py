import asyncio
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason


def route(
    *targets: tuple[str, int], tenant: str = "*", task: str = "ner", expected: int | None = None
) -> store_pb2.SetRouteRequest:
    return store_pb2.SetRouteRequest(
        route=adapter_pb2.Route(
            tenant=tenant,
            task=task,
            targets=[adapter_pb2.RouteTarget(ref=ref, weight=weight) for ref, weight in targets],
        ),
        expected_generation=expected,
    )


async def listed(store: Any, **fields: Any) -> list[tuple[str, str, int]]:
    found = []
    token = ""
    while True:
        page = await store.stub.ListRoutes(store_pb2.ListRoutesRequest(page_token=token, **fields))
        found += [(item.tenant, item.task, item.generation) for item in page.routes]
        token = page.next_page_token
        if not token:
            return found


async def test_a_route_goes_to_versions_aliases_digests_and_the_base(store: Any, publish: Any) -> None:
    (version,) = await publish()
    await store.stub.SetAlias(
        store_pb2.SetAliasRequest(namespace="acme", name="ner", alias="prod", version_number=1)
    )
    refs = ["acme/ner:v1", "acme/ner@prod", f"acme/ner@{version.digest}", "base"]
    done = await store.stub.SetRoute(route(*((ref, 1) for ref in refs)))
    assert [target.ref for target in done.route.targets] == refs
    assert done.route.generation == 1
    assert done.feed_position == 4
    page = await store.stub.ListRoutes(store_pb2.ListRoutesRequest())
    assert list(page.routes) == [done.route]


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("acme/other:v1", Reason.ADAPTER_NOT_FOUND),
        ("acme/ner:v2", Reason.VERSION_NOT_FOUND),
        ("acme/ner@prod", Reason.ALIAS_NOT_FOUND),
        ("acme/ner", Reason.ALIAS_NOT_FOUND),
        ("acme/ner@sha256:" + "0" * 64, Reason.VERSION_NOT_FOUND),
    ],
)
async def test_a_target_that_does_not_exist_is_not_found(
    store: Any, publish: Any, kit: Any, ref: str, reason: Reason
) -> None:
    await publish()
    async with kit.refused() as errors:
        await store.stub.SetRoute(route(("base", 1), (ref, 1)))
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, reason)
    assert await listed(store) == []


@pytest.mark.parametrize(
    "request_",
    [
        route(),
        route(("base", 0)),
        route(("base", -1), ("base", 5)),
        route(("base", 1_000_001)),
        route(("not a ref", 1)),
        route(("base", 1), tenant=""),
        route(("base", 1), tenant="Acme"),
        route(("base", 1), task=""),
        route(("base", 1), expected=-1),
        route(*[("base", 1)] * 65),
    ],
    ids=str,
)
async def test_an_illegal_route_is_refused(store: Any, kit: Any, request_: Any) -> None:
    async with kit.refused() as errors:
        await store.stub.SetRoute(request_)
    assert errors[0].code is Code.INVALID_ARGUMENT
    assert await listed(store) == []


async def test_a_route_changes_by_compare_and_set(store: Any, kit: Any) -> None:
    await store.stub.SetRoute(route(("base", 1), expected=0))
    changed = await store.stub.SetRoute(route(("base", 7), expected=1))
    assert changed.route.generation == 2
    assert changed.route.targets[0].weight == 7
    async with kit.refused() as errors:
        await store.stub.SetRoute(route(("base", 9), expected=1))
    assert (errors[0].code, errors[0].reason) == (Code.ABORTED, Reason.ROUTE_CONFLICT)
    assert errors[0].metadata == {"name": "*/ner", "generation": "2"}


async def test_exactly_one_of_many_changes_of_a_route_wins(store: Any) -> None:
    attempts = (store.stub.SetRoute(route(("base", n + 1), expected=0)) for n in range(8))
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(outcome, store_pb2.SetRouteResponse) for outcome in outcomes) == 1
    assert await listed(store) == [("*", "ner", 1)]


async def test_a_generation_never_stands_for_two_routes_even_over_a_deletion(store: Any, kit: Any) -> None:
    await store.stub.SetRoute(route(("base", 1)))
    gone = await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="*", task="ner"))
    assert gone.feed_position == 3
    assert await listed(store) == []
    async with kit.refused() as errors:
        await store.stub.SetRoute(route(("base", 1), expected=1))
    assert errors[0].metadata["generation"] == "0"
    again = await store.stub.SetRoute(route(("base", 1), expected=0))
    assert again.route.generation > 1


async def test_a_route_that_is_not_there_can_not_be_deleted(store: Any, kit: Any) -> None:
    await store.stub.SetRoute(route(("base", 1)))
    await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="*", task="ner"))
    for task in ("ner", "other"):
        async with kit.refused() as errors:
            await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="*", task=task))
        assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.ROUTE_NOT_FOUND)
        assert errors[0].metadata["name"] == f"*/{task}"


async def test_routes_are_listed_by_tenant_and_task_in_pages(store: Any) -> None:
    for tenant, task in [("b", "x"), ("a", "y"), ("*", "z"), ("a", "x"), ("b", "a")]:
        await store.stub.SetRoute(route(("base", 1), tenant=tenant, task=task))
    everything = [("*", "z", 1), ("a", "x", 1), ("a", "y", 1), ("b", "a", 1), ("b", "x", 1)]
    assert await listed(store, page_size=2) == everything
    assert await listed(store, tenant="a", page_size=1) == everything[1:3]
