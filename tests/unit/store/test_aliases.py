import asyncio
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason


def move(version: int = 1, **fields: Any) -> store_pb2.SetAliasRequest:
    values = {"namespace": "acme", "name": "ner", "alias": "prod", "version_number": version}
    return store_pb2.SetAliasRequest(**{**values, **fields})


def back(**fields: Any) -> store_pb2.RollBackAliasRequest:
    return store_pb2.RollBackAliasRequest(**{"namespace": "acme", "name": "ner", "alias": "prod", **fields})


async def history(store: Any, **fields: Any) -> Any:
    values = {"namespace": "acme", "name": "ner", "alias": "prod", **fields}
    return await store.stub.ListAliasHistory(store_pb2.ListAliasHistoryRequest(**values))


async def test_an_alias_moves_and_remembers_every_move(store: Any, publish: Any) -> None:
    first, second = await publish(seeds=(1, 2))
    set_once = await store.stub.SetAlias(move(1, expected_generation=0, actor="ada", comment="first"))
    assert (set_once.alias.generation, set_once.alias.digest) == (1, first.digest)
    assert set_once.feed_position == 4
    moved = await store.stub.SetAlias(move(2, expected_generation=1))
    assert (moved.alias.generation, moved.alias.digest) == (2, second.digest)
    moves = (await history(store)).moves
    assert [(m.generation, m.version_number, m.actor, m.comment) for m in moves] == [
        (2, 2, "", ""),
        (1, 1, "ada", "first"),
    ]
    assert moves[0] == moved.alias


async def test_exactly_one_of_many_movers_wins(store: Any, publish: Any) -> None:
    await publish(seeds=(1, 2))
    await store.stub.SetAlias(move(1))
    attempts = (store.stub.SetAlias(move(2, expected_generation=1, actor=str(n))) for n in range(10))
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    winners = [outcome for outcome in outcomes if isinstance(outcome, store_pb2.SetAliasResponse)]
    assert len(winners) == 1
    moves = (await history(store)).moves
    assert [m.generation for m in moves] == [2, 1]
    assert moves[0].actor == winners[0].alias.actor


async def test_a_lost_race_says_where_the_alias_is(store: Any, publish: Any, kit: Any) -> None:
    await publish(seeds=(1, 2))
    await store.stub.SetAlias(move(1))
    await store.stub.SetAlias(move(2))
    async with kit.refused() as errors:
        await store.stub.SetAlias(move(1, expected_generation=1))
    assert (errors[0].code, errors[0].reason) == (Code.ABORTED, Reason.ALIAS_CONFLICT)
    assert errors[0].metadata["generation"] == "2"
    assert errors[0].metadata["name"] == "acme/ner@prod"


@pytest.mark.parametrize("expected", [0, 2])
async def test_expecting_another_generation_than_the_alias_has_is_a_conflict(
    store: Any, publish: Any, kit: Any, expected: int
) -> None:
    await publish()
    if expected == 0:
        await store.stub.SetAlias(move(1))
    async with kit.refused() as errors:
        await store.stub.SetAlias(move(1, expected_generation=expected))
    assert errors[0].reason is Reason.ALIAS_CONFLICT


async def test_a_rollback_goes_to_the_version_before_and_back_again(store: Any, publish: Any) -> None:
    await publish(seeds=(1, 2, 3))
    for number in (1, 2, 3, 3):
        await store.stub.SetAlias(move(number))
    seen = [(await store.stub.RollBackAlias(back(comment="bad"))).alias.version_number for _ in range(3)]
    assert seen == [2, 3, 2]
    moves = (await history(store)).moves
    assert [m.version_number for m in moves] == [2, 3, 2, 3, 3, 2, 1]
    assert [m.generation for m in moves] == [7, 6, 5, 4, 3, 2, 1]
    assert moves[0].comment == "bad"


async def test_a_rollback_compares_the_generation_too(store: Any, publish: Any, kit: Any) -> None:
    await publish(seeds=(1, 2))
    await store.stub.SetAlias(move(1))
    await store.stub.SetAlias(move(2))
    async with kit.refused() as errors:
        await store.stub.RollBackAlias(back(expected_generation=1))
    assert errors[0].reason is Reason.ALIAS_CONFLICT
    assert (await store.stub.RollBackAlias(back(expected_generation=2))).alias.version_number == 1


async def test_there_is_no_way_back_from_the_only_version(store: Any, publish: Any, kit: Any) -> None:
    await publish()
    await store.stub.SetAlias(move(1))
    await store.stub.SetAlias(move(1))
    async with kit.refused() as errors:
        await store.stub.RollBackAlias(back())
    assert errors[0].code is Code.FAILED_PRECONDITION


async def test_what_is_unknown_is_not_found_by_its_name(store: Any, publish: Any, kit: Any) -> None:
    await publish()
    cases = [
        (store.stub.SetAlias(move(1, name="other")), Reason.ADAPTER_NOT_FOUND, "acme/other"),
        (store.stub.SetAlias(move(2)), Reason.VERSION_NOT_FOUND, "acme/ner:v2"),
        (store.stub.RollBackAlias(back()), Reason.ALIAS_NOT_FOUND, "acme/ner@prod"),
        (history(store), Reason.ALIAS_NOT_FOUND, "acme/ner@prod"),
        (history(store, name="other"), Reason.ADAPTER_NOT_FOUND, "acme/other"),
    ]
    for call, reason, name in cases:
        async with kit.refused() as errors:
            await call
        assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, reason)
        assert errors[0].metadata["name"] == name


@pytest.mark.parametrize(
    "fields",
    [
        {"version_number": 0},
        {"alias": "Prod"},
        {"alias": ""},
        {"name": ""},
        {"actor": "x" * 257},
        {"comment": "x" * 1025},
        {"expected_generation": -1},
    ],
)
async def test_a_move_with_an_illegal_field_is_refused(
    store: Any, publish: Any, kit: Any, fields: dict[str, Any]
) -> None:
    await publish()
    async with kit.refused() as errors:
        await store.stub.SetAlias(move(**fields))
    assert errors[0].code is Code.INVALID_ARGUMENT


async def test_the_history_pages_stay_in_place_while_the_alias_moves(store: Any, publish: Any) -> None:
    await publish(seeds=(1, 2))
    for number in (1, 2, 1, 2, 1):
        await store.stub.SetAlias(move(number))
    first = await history(store, page_size=2)
    await store.stub.SetAlias(move(2))
    second = await history(store, page_size=2, page_token=first.next_page_token)
    third = await history(store, page_size=2, page_token=second.next_page_token)
    pages = [[m.generation for m in page.moves] for page in (first, second, third)]
    assert pages == [[5, 4], [3, 2], [1]]
    assert third.next_page_token == ""


def protection(protected: bool, **fields: Any) -> store_pb2.SetAliasProtectionRequest:
    values = {"namespace": "acme", "name": "ner", "alias": "prod", "protected": protected, **fields}
    return store_pb2.SetAliasProtectionRequest(**values)


def removal(**fields: Any) -> store_pb2.DeleteAliasRequest:
    return store_pb2.DeleteAliasRequest(**{"namespace": "acme", "name": "ner", "alias": "prod", **fields})


async def test_a_protected_alias_moves_only_when_that_is_acknowledged(
    store: Any, publish: Any, kit: Any
) -> None:
    await publish(seeds=(1, 2, 3))
    for number in (1, 2):
        await store.stub.SetAlias(move(number))
    protected = (await store.stub.SetAliasProtection(protection(True, expected_generation=2))).alias
    assert (protected.protected, protected.version_number, protected.generation) == (True, 2, 3)
    for call, request in (
        (store.stub.SetAlias, move(3)),
        (store.stub.RollBackAlias, back()),
        (store.stub.DeleteAlias, removal()),
    ):
        async with kit.refused() as errors:
            await call(request)
        assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.ALIAS_PROTECTED)
        assert errors[0].metadata["name"] == "acme/ner@prod"
    moved = (await store.stub.SetAlias(move(3, acknowledge_protection=True))).alias
    assert (moved.version_number, moved.protected) == (3, True)
    rolled = (await store.stub.RollBackAlias(back(acknowledge_protection=True))).alias
    assert (rolled.version_number, rolled.protected) == (2, True)
    await store.stub.SetAliasProtection(protection(False))
    assert not (await store.stub.SetAlias(move(3))).alias.protected


async def test_the_history_says_who_protected_an_alias_and_why(store: Any, publish: Any) -> None:
    await publish()
    await store.stub.SetAlias(move(1))
    await store.stub.SetAliasProtection(protection(True, actor="ada", comment="the bank uses it"))
    await store.stub.SetAliasProtection(protection(False, actor="bob"))
    entries = [(m.action, m.actor, m.comment) for m in (await history(store)).moves]
    assert entries == [
        (adapter_pb2.ALIAS_ACTION_UNPROTECTED, "bob", ""),
        (adapter_pb2.ALIAS_ACTION_PROTECTED, "ada", "the bank uses it"),
        (adapter_pb2.ALIAS_ACTION_SET, "", ""),
    ]


async def test_a_removed_alias_is_gone_and_its_history_goes_on(store: Any, publish: Any, kit: Any) -> None:
    await publish(seeds=(1, 2))
    await store.stub.SetAlias(move(1))
    gone = await store.stub.DeleteAlias(removal(expected_generation=1, actor="ada", comment="unused"))
    assert (gone.alias.action, gone.alias.generation) == (adapter_pb2.ALIAS_ACTION_DELETED, 2)
    async with kit.refused() as errors:
        await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref="acme/ner@prod"))
    assert errors[0].reason is Reason.ALIAS_NOT_FOUND
    assert list((await store.snapshot()).aliases) == []
    again = (await store.stub.SetAlias(move(2, expected_generation=0))).alias
    assert (again.generation, again.protected) == (3, False)
    moves = (await history(store)).moves
    assert [(m.generation, m.version_number, m.comment) for m in moves] == [
        (3, 2, ""),
        (2, 1, "unused"),
        (1, 1, ""),
    ]


async def test_a_removal_compares_the_generation_and_needs_an_alias(
    store: Any, publish: Any, kit: Any
) -> None:
    await publish()
    for call, request in (
        (store.stub.DeleteAlias, removal()),
        (store.stub.SetAliasProtection, protection(True)),
    ):
        async with kit.refused() as errors:
            await call(request)
        assert errors[0].reason is Reason.ALIAS_NOT_FOUND
    await store.stub.SetAlias(move(1))
    for call, request in (
        (store.stub.DeleteAlias, removal(expected_generation=2)),
        (store.stub.SetAliasProtection, protection(True, expected_generation=0)),
    ):
        async with kit.refused() as errors:
            await call(request)
        assert errors[0].reason is Reason.ALIAS_CONFLICT


async def test_watchers_hear_of_a_protection_and_of_a_removal(store: Any, publish: Any) -> None:
    await publish()
    start = (await store.stub.SetAlias(move(1))).feed_position
    protected = (await store.stub.SetAliasProtection(protection(True))).alias
    gone = (await store.stub.DeleteAlias(removal(acknowledge_protection=True))).alias
    feed_id = (await store.snapshot()).feed_id
    call = store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=feed_id, after_position=start))
    first, second = await call.read(), await call.read()
    call.cancel()
    assert first.change.alias_set == protected
    assert second.change.alias_deleted == gone


@pytest.mark.parametrize("ref", ["acme/ner@prod", "average(acme/ner:v1, 0.5*acme/ner@prod)"])
async def test_an_alias_that_a_route_uses_can_not_be_removed(
    store: Any, publish: Any, kit: Any, ref: str
) -> None:
    await publish()
    await store.stub.SetAlias(move(1))
    targets = [adapter_pb2.RouteTarget(ref=ref, weight=1)]
    route = adapter_pb2.Route(tenant="bank", task="names", targets=targets)
    await store.stub.SetRoute(store_pb2.SetRouteRequest(route=route))
    async with kit.refused() as errors:
        await store.stub.DeleteAlias(removal())
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.ALIAS_IN_USE)
    assert "bank/names" in errors[0].message
    await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="bank", task="names"))
    await store.stub.DeleteAlias(removal())


async def test_nothing_but_setting_it_sets_latest(store: Any, publish: Any, kit: Any) -> None:
    await publish(seeds=(1, 2))
    await store.stub.SetAlias(move(1))
    await store.stub.SetAlias(move(2))
    await store.stub.RollBackAlias(back())
    async with kit.refused() as errors:
        await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref="acme/ner"))
    assert errors[0].reason is Reason.ALIAS_NOT_FOUND
    await store.stub.SetAlias(move(1, alias="latest"))
    await publish(seeds=(3,))
    found = await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref="acme/ner"))
    assert found.version.number == 1
