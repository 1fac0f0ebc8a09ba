"""What is said of a version after its upload, and what follows from it."""

import asyncio
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason

ACTIVE = adapter_pb2.VERSION_STATE_ACTIVE
DEPRECATED = adapter_pb2.VERSION_STATE_DEPRECATED
REVOKED = adapter_pb2.VERSION_STATE_REVOKED


async def set_status(store: Any, state: Any, version: int = 1, **fields: Any) -> Any:
    values = {"namespace": "acme", "name": "ner", "version_number": version, "state": state}
    if state == REVOKED:
        values["reason"] = "bad data"
    return await store.stub.SetVersionStatus(store_pb2.SetVersionStatusRequest(**{**values, **fields}))


async def resolve(store: Any, ref: str, **fields: Any) -> Any:
    response = await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref=ref, **fields))
    return response.version


async def fetch(store: Any, digest: str) -> int:
    return len([one async for one in store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=digest))])


async def point(store: Any, version: int, alias: str = "prod") -> Any:
    request = store_pb2.SetAliasRequest(namespace="acme", name="ner", alias=alias, version_number=version)
    return await store.stub.SetAlias(request)


async def route(store: Any, ref: str) -> Any:
    targets = [adapter_pb2.RouteTarget(ref=ref, weight=1)]
    request = store_pb2.SetRouteRequest(route=adapter_pb2.Route(tenant="*", task="ner", targets=targets))
    return await store.stub.SetRoute(request)


async def test_a_new_version_is_active_and_nothing_was_ever_said_of_it(store: Any, publish: Any) -> None:
    (version,) = await publish()
    assert version.status == adapter_pb2.VersionStatus(state=ACTIVE)


async def test_a_status_says_who_when_why_and_what_to_use_instead(store: Any, publish: Any) -> None:
    first, _ = await publish(seeds=(1, 2))
    done = await set_status(
        store, DEPRECATED, reason="old dates", replacement="acme/ner:v2", actor="ada", expected_generation=0
    )
    status = done.version.status
    assert (status.state, status.reason, status.replacement) == (DEPRECATED, "old dates", "acme/ner:v2")
    assert (status.actor, status.generation) == ("ada", 1)
    assert status.update_time.seconds > 0
    assert done.version.digest == first.digest
    assert await resolve(store, "acme/ner:v1") == done.version


async def test_what_is_deprecated_is_served_and_can_be_pointed_at(store: Any, publish: Any) -> None:
    (version,) = await publish()
    await set_status(store, DEPRECATED)
    assert (await resolve(store, "acme/ner:v1")).status.state == DEPRECATED
    assert await fetch(store, version.digest) > 0
    await point(store, 1)
    await route(store, "acme/ner:v1")


async def test_whatever_means_a_revoked_version_is_refused_with_the_reason(
    store: Any, publish: Any, kit: Any
) -> None:
    first, _ = await publish(seeds=(1, 2))
    await point(store, 1)
    await point(store, 2, "canary")
    await route(store, "acme/ner@prod")
    await set_status(store, REVOKED, reason="trained on what we may not use")
    uses = [
        resolve(store, "acme/ner:v1"),
        resolve(store, "acme/ner@prod"),
        resolve(store, f"acme/ner@{first.digest}"),
        fetch(store, first.digest),
        point(store, 1, "canary"),
        route(store, "acme/ner:v1"),
        route(store, "acme/ner@prod"),
        route(store, "average(acme/ner@canary, acme/ner:v1)"),
    ]
    for use in uses:
        async with kit.refused() as errors:
            await use
        assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_REVOKED)
        assert "trained on what we may not use" in errors[0].message
        assert errors[0].metadata["digest"] == first.digest
    assert (await resolve(store, "acme/ner@canary")).number == 2


async def test_a_revoked_version_can_be_looked_at(store: Any, publish: Any) -> None:
    (version,) = await publish()
    await point(store, 1)
    await set_status(store, REVOKED)
    for ref in ("acme/ner:v1", "acme/ner@prod"):
        assert (await resolve(store, ref, include_unusable=True)).status.state == REVOKED
    request = store_pb2.DownloadFileRequest(digest=version.digest, path="README.md")
    assert [part.data async for part in store.stub.DownloadFile(request)]
    listed = await store.stub.ListVersions(store_pb2.ListVersionsRequest(namespace="acme", name="ner"))
    assert [one.status.reason for one in listed.versions] == ["bad data"]


async def test_a_rollback_to_a_revoked_version_is_refused_and_moves_nothing(
    store: Any, publish: Any, kit: Any
) -> None:
    await publish(seeds=(1, 2))
    await point(store, 1)
    await point(store, 2)
    await set_status(store, REVOKED)
    async with kit.refused() as errors:
        await store.stub.RollBackAlias(
            store_pb2.RollBackAliasRequest(namespace="acme", name="ner", alias="prod")
        )
    assert errors[0].reason is Reason.VERSION_REVOKED
    assert (await resolve(store, "acme/ner@prod")).number == 2


@pytest.mark.parametrize("state", [DEPRECATED, REVOKED])
async def test_what_was_deprecated_or_revoked_can_be_active_again(
    store: Any, publish: Any, state: Any
) -> None:
    (version,) = await publish()
    await point(store, 1)
    await set_status(store, state)
    restored = await set_status(store, ACTIVE, reason="it was the other one", expected_generation=1)
    assert (restored.version.status.state, restored.version.status.generation) == (ACTIVE, 2)
    assert await resolve(store, "acme/ner@prod") == restored.version
    assert await fetch(store, version.digest) > 0


async def test_exactly_one_of_many_setters_of_a_generation_wins(store: Any, publish: Any) -> None:
    await publish()
    attempts = (set_status(store, REVOKED, expected_generation=0, actor=str(n)) for n in range(8))
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    winners = [one for one in outcomes if isinstance(one, store_pb2.SetVersionStatusResponse)]
    assert len(winners) == 1
    version = await resolve(store, "acme/ner:v1", include_unusable=True)
    assert version == winners[0].version


async def test_a_lost_race_says_what_the_status_is(store: Any, publish: Any, kit: Any) -> None:
    await publish()
    await set_status(store, REVOKED)
    async with kit.refused() as errors:
        await set_status(store, ACTIVE, expected_generation=0)
    assert (errors[0].code, errors[0].reason) == (Code.ABORTED, Reason.STATUS_CONFLICT)
    assert (errors[0].metadata["generation"], errors[0].metadata["state"]) == ("1", "revoked")


async def test_a_replacement_must_be_there_and_usable(store: Any, publish: Any, kit: Any) -> None:
    await publish(seeds=(1, 2))
    await set_status(store, REVOKED, version=2)
    cases = [
        ("acme/ner:v3", Reason.VERSION_NOT_FOUND),
        ("acme/ner@prod", Reason.ALIAS_NOT_FOUND),
        ("acme/ner:v2", Reason.VERSION_REVOKED),
        ("acme/ner:v1", Reason.INVALID_FIELD),
        ("nothing", Reason.INVALID_REF),
    ]
    for replacement, reason in cases:
        async with kit.refused() as errors:
            await set_status(store, DEPRECATED, replacement=replacement)
        assert errors[0].reason is reason
    assert (await resolve(store, "acme/ner:v1")).status.generation == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"state": adapter_pb2.VERSION_STATE_UNSPECIFIED},
        {"state": 77},
        {"state": REVOKED, "reason": ""},
        {"state": REVOKED, "replacement": "acme/ner:v2"},
        {"state": DEPRECATED, "reason": "x" * 1025},
        {"state": DEPRECATED, "actor": "x" * 257},
        {"state": DEPRECATED, "expected_generation": -1},
        {"state": DEPRECATED, "version": 0},
        {"state": DEPRECATED, "name": "No"},
    ],
)
async def test_a_status_that_can_not_be_is_refused(
    store: Any, publish: Any, kit: Any, fields: dict[str, Any]
) -> None:
    await publish(seeds=(1, 2))
    async with kit.refused() as errors:
        await set_status(store, **fields)
    assert errors[0].code is Code.INVALID_ARGUMENT
    assert (await resolve(store, "acme/ner:v1")).status.generation == 0


async def test_a_version_that_is_not_there_has_no_status(store: Any, publish: Any, kit: Any) -> None:
    await publish()
    for fields, name in (({"version": 2}, "acme/ner:v2"), ({"name": "other"}, "acme/other")):
        async with kit.refused() as errors:
            await set_status(store, REVOKED, **fields)
        assert (errors[0].code, errors[0].metadata["name"]) == (Code.NOT_FOUND, name)


async def test_a_list_says_which_of_the_newest_and_aliased_versions_are_revoked(
    store: Any, publish: Any
) -> None:
    await publish(seeds=(1, 2, 3, 4))
    await point(store, 1)
    await point(store, 2, "canary")
    for number in (1, 3, 4):
        await set_status(store, REVOKED, version=number)
    (adapter,) = (await store.stub.ListAdapters(store_pb2.ListAdaptersRequest())).adapters
    assert list(adapter.unusable_numbers) == [1, 4]
    assert adapter.newest.status.state == REVOKED


async def test_uploading_revoked_content_again_brings_the_revoked_version(
    store: Any, publish: Any, kit: Any
) -> None:
    await publish(seeds=(1,))
    await set_status(store, REVOKED)
    again = await store.upload(kit.make_files(1))
    assert (again.created, again.version.status.state) == (False, REVOKED)


async def test_watchers_and_snapshots_hear_of_it(store: Any, publish: Any) -> None:
    await publish()
    done = await set_status(store, REVOKED)
    whole = await store.snapshot()
    assert list(whole.versions) == [done.version]
    assert whole.feed_position == done.feed_position
    call = store.stub.WatchChanges(
        store_pb2.WatchChangesRequest(feed_id=whole.feed_id, after_position=done.feed_position - 1)
    )
    message = await call.read()
    call.cancel()
    assert message.change.version_status_set == done.version
