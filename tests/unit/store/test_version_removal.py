"""Versions that are removed: what stands in the way, what is left of them, and what nobody finds any more."""

import asyncio
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import delete, insert, select

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason
from adaptermesh.store.schema import unread_lineages, version_parents, versions


async def remove(store: Any, version: Any, **fields: Any) -> Any:
    values = {
        "namespace": version.namespace,
        "name": version.name,
        "version_number": version.number,
        "digest": version.digest,
    }
    return await store.stub.DeleteVersion(store_pb2.DeleteVersionRequest(**{**values, **fields}))


async def point(store: Any, number: int, alias: str = "prod") -> Any:
    request = store_pb2.SetAliasRequest(namespace="acme", name="ner", alias=alias, version_number=number)
    return await store.stub.SetAlias(request)


async def route(store: Any, ref: str) -> Any:
    targets = [adapter_pb2.RouteTarget(ref=ref, weight=1)]
    request = store_pb2.SetRouteRequest(route=adapter_pb2.Route(tenant="*", task="ner", targets=targets))
    return await store.stub.SetRoute(request)


async def resolve(store: Any, ref: str, **fields: Any) -> Any:
    return (await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref=ref, **fields))).version


async def read(stream: Any) -> list[Any]:
    return [message async for message in stream]


async def numbers(store: Any) -> list[int]:
    request = store_pb2.ListVersionsRequest(namespace="acme", name="ner")
    return [version.number for version in (await store.stub.ListVersions(request)).versions]


async def found(store: Any, text: str = "", **fields: Any) -> list[str]:
    response = await store.stub.SearchAdapters(store_pb2.SearchAdaptersRequest(text=text, **fields))
    return [f"{one.newest.namespace}/{one.newest.name}:v{one.newest.number}" for one in response.adapters]


async def listed(store: Any) -> list[tuple[int, int]]:
    response = await store.stub.ListAdapters(store_pb2.ListAdaptersRequest())
    return [(one.newest.number, one.version_count) for one in response.adapters]


async def test_whatever_means_a_removed_version_hears_who_removed_it_when_and_why(
    store: Any, publish: Any, kit: Any
) -> None:
    first, _ = await publish(seeds=(1, 2))
    done = await remove(store, first, actor="ada", reason="uploaded by mistake")
    assert (done.deleted.number, done.deleted.digest) == (1, first.digest)
    assert done.deleted.delete_time.seconds > 0
    fetch = store_pb2.FetchAdapterRequest(digest=first.digest, include_unusable=True)
    file = store_pb2.DownloadFileRequest(digest=first.digest, path="README.md")
    uses = [
        resolve(store, "acme/ner:v1"),
        resolve(store, "acme/ner:v1", include_unusable=True),
        resolve(store, f"acme/ner@{first.digest}"),
        store.stub.ResolveRef(store_pb2.ResolveRefRequest(digest=first.digest)),
        read(store.stub.FetchAdapter(fetch)),
        read(store.stub.DownloadFile(file)),
        store.stub.ListSignatures(store_pb2.ListSignaturesRequest(digest=first.digest)),
        point(store, 1),
        route(store, "acme/ner:v1"),
        remove(store, first),
        store.upload(kit.make_files(7), name="child", parents=[first.digest]),
    ]
    for use in uses:
        async with kit.refused() as errors:
            await use
        assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.VERSION_DELETED)
        assert "means acme/ner:v1, which was removed at 20" in errors[0].message
        assert errors[0].message.endswith("by ada: uploaded by mistake")
        assert (errors[0].metadata["actor"], errors[0].metadata["version"]) == ("ada", "acme/ner:v1")


async def test_a_removed_version_is_neither_listed_nor_counted_and_its_number_is_not_given_again(
    store: Any, publish: Any
) -> None:
    _, second, _ = await publish(seeds=(1, 2, 3))
    await remove(store, second)
    assert await numbers(store) == [3, 1]
    assert await listed(store) == [(3, 2)]
    (fourth,) = await publish(seeds=(4,))
    assert fourth.number == 4
    assert await listed(store) == [(4, 3)]


async def test_the_same_content_is_a_new_version_after_its_removal(
    store: Any, publish: Any, kit: Any
) -> None:
    (first,) = await publish()
    await remove(store, first, reason="wrong")
    (again,) = await publish()
    assert (again.number, again.digest) == (2, first.digest)
    assert (await resolve(store, f"acme/ner@{first.digest}")).number == 2
    assert len(await read(store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=first.digest)))) > 1
    async with kit.refused() as errors:
        await resolve(store, "acme/ner:v1")
    assert errors[0].reason is Reason.VERSION_DELETED
    await remove(store, again, reason="wrong again")
    async with kit.refused() as errors:
        await resolve(store, f"acme/ner@{first.digest}")
    assert "means acme/ner:v2" in errors[0].message


async def test_what_uses_a_version_keeps_it_and_is_named(store: Any, publish: Any, kit: Any) -> None:
    (first,) = await publish()
    await point(store, 1)
    await point(store, 1, "canary")
    await route(store, f"average(acme/ner:v1, acme/ner@{first.digest})")
    child = await store.upload(kit.make_files(7), name="child", parents=[first.digest])
    async with kit.refused() as errors:
        await remove(store, first)
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.VERSION_IN_USE)
    named = {kind: errors[0].metadata[kind] for kind in ("aliases", "routes", "versions")}
    assert named == {"aliases": "canary, prod", "routes": "*/ner", "versions": "acme/child:v1"}
    assert "aliases point at it: canary, prod; routes name it: */ner" in errors[0].message
    for alias in ("prod", "canary"):
        wanted = store_pb2.DeleteAliasRequest(namespace="acme", name="ner", alias=alias)
        await store.stub.DeleteAlias(wanted)
    await store.stub.DeleteRoute(store_pb2.DeleteRouteRequest(tenant="*", task="ner"))
    await remove(store, child.version)
    await remove(store, first)
    assert await numbers(store) == []


async def test_the_history_of_an_alias_outlives_the_versions_it_pointed_at(
    store: Any, publish: Any, kit: Any
) -> None:
    first, _ = await publish(seeds=(1, 2))
    await point(store, 1)
    await point(store, 2)
    await remove(store, first)
    wanted = store_pb2.ListAliasHistoryRequest(namespace="acme", name="ner", alias="prod")
    moves = (await store.stub.ListAliasHistory(wanted)).moves
    assert [(move.version_number, move.digest == first.digest) for move in moves] == [(2, False), (1, True)]
    async with kit.refused() as errors:
        back = store_pb2.RollBackAliasRequest(namespace="acme", name="ner", alias="prod")
        await store.stub.RollBackAlias(back)
    assert errors[0].reason is Reason.VERSION_DELETED


async def test_another_digest_than_the_one_that_was_looked_at_removes_nothing(
    store: Any, publish: Any, kit: Any
) -> None:
    (first,) = await publish()
    for digest, reason in ((digest_bytes(b"x"), Reason.DIGEST_MISMATCH), ("", Reason.INVALID_FIELD)):
        async with kit.refused() as errors:
            await remove(store, first, digest=digest)
        assert errors[0].reason is reason
    for number, reason in ((2, Reason.VERSION_NOT_FOUND), (0, Reason.INVALID_FIELD)):
        async with kit.refused() as errors:
            await remove(store, first, version_number=number)
        assert errors[0].reason is reason
    assert await numbers(store) == [1]


async def test_an_adapter_is_found_by_the_version_before_a_newest_one_that_is_removed(
    store: Any, publish: Any, kit: Any
) -> None:
    (old,) = await publish(card=b"# Old\n\nAbout invoices.\n", tags=["older"])
    await publish(name="other", seeds=(9,))
    (new,) = await publish(seeds=(2,), card=b"# New\n\nAbout receipts.\n", tags=["newer"])
    assert await found(store, "receipts") == ["acme/ner:v2"]
    await remove(store, new)
    assert await found(store, "receipts") == []
    assert await found(store, "invoices") == ["acme/ner:v1"]
    assert await found(store, tags=["older"]) == ["acme/ner:v1"]
    assert await found(store, tags=["newer"]) == []
    # By when the version that is searched was published, not by what happened since.
    assert await found(store) == ["acme/other:v1", "acme/ner:v1"]
    await remove(store, old)
    assert await found(store) == ["acme/other:v1"]
    assert await listed(store) == [(1, 1)]
    (again,) = await publish(seeds=(5,), card=b"# Again\n\nAbout ledgers.\n")
    assert (again.number, await found(store, "ledgers")) == (3, ["acme/ner:v3"])


async def test_the_bytes_that_no_other_version_needs_are_garbage_and_the_others_stay(
    store: Any, publish: Any
) -> None:
    first, second = await publish(seeds=(1, 2))
    kept = {path.split("/")[-1] for path in store.left_files()}
    await remove(store, first)
    now = store_pb2.CollectGarbageRequest(grace=Duration())
    report = await store.stub.CollectGarbage(now)
    # Config and card are those of the second one, too.
    assert (report.removed_blobs, report.needed_blobs) == (3, 5)
    left = {path.split("/")[-1] for path in store.left_files()}
    mine = {first.digest, next(f.digest for f in first.source_files if f.path.endswith(".safetensors"))}
    assert {digest.removeprefix("sha256:")[2:] for digest in mine} <= kept - left
    assert len(await read(store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=second.digest)))) > 1


async def test_followers_and_newcomers_hear_of_a_removal(store: Any, publish: Any) -> None:
    first, _ = await publish(seeds=(1, 2))
    before = await store.snapshot()
    done = await remove(store, first, actor="ada", reason="wrong")
    watch = store.stub.WatchChanges(
        store_pb2.WatchChangesRequest(feed_id=before.feed_id, after_position=before.feed_position)
    )
    async for message in watch:
        assert message.change.position == done.feed_position
        assert message.change.version_deleted == done.deleted
        break
    watch.cancel()
    after = await store.snapshot()
    assert [version.number for version in after.versions] == [2]
    assert list(after.deleted_versions) == [done.deleted]


async def test_a_version_can_be_removed_whatever_was_said_of_it_and_its_history_stays(
    store: Any, publish: Any, kit: Any
) -> None:
    (first,) = await publish()
    values: dict[str, Any] = {"namespace": "acme", "name": "ner", "version_number": 1, "actor": "ada"}
    said: tuple[tuple[Any, str], ...] = ((2, "old"), (3, "bad data"), (1, "not so bad"))
    for state, reason in said:
        await store.stub.SetVersionStatus(
            store_pb2.SetVersionStatusRequest(**values, state=state, reason=reason)
        )
    await remove(store, first, actor="eve", reason="after all")
    wanted = store_pb2.ListStatusHistoryRequest(namespace="acme", name="ner", version_number=1, page_size=2)
    page = await store.stub.ListStatusHistory(wanted)
    wanted.page_token = page.next_page_token
    rest = await store.stub.ListStatusHistory(wanted)
    assert rest.next_page_token == ""
    told = [(one.state, one.reason, one.actor, one.generation) for one in (*page.statuses, *rest.statuses)]
    assert told == [(1, "not so bad", "ada", 3), (3, "bad data", "ada", 2), (2, "old", "ada", 1)]
    assert all(one.update_time.seconds for one in page.statuses)
    assert (page.deletion.actor, page.deletion.reason) == ("eve", "after all")
    # The number's next life has none of it.
    (again,) = await publish()
    wanted = store_pb2.ListStatusHistoryRequest(namespace="acme", name="ner", version_number=again.number)
    assert await store.stub.ListStatusHistory(wanted) == store_pb2.ListStatusHistoryResponse()
    async with kit.refused() as errors:
        wanted.version_number = 9
        await store.stub.ListStatusHistory(wanted)
    assert errors[0].reason is Reason.VERSION_NOT_FOUND


async def test_what_an_older_release_published_is_known_to_be_a_parent_when_it_matters(
    store: Any, publish: Any, kit: Any
) -> None:
    one, two, other = await publish(seeds=(1, 2, 3))
    await store.upload(kit.make_files(7), name="child", parents=[one.digest, two.digest])

    async def forget(connection: Any) -> None:
        await connection.execute(delete(version_parents))
        await connection.execute(insert(unread_lineages).from_select(["version_id"], select(versions.c.id)))

    await store.stores.database.write(forget)
    async with kit.refused() as errors:
        await remove(store, two)
    assert errors[0].metadata["versions"] == "acme/child:v1"
    async with store.stores.database.reading() as connection:
        assert (await connection.execute(select(unread_lineages))).all() == []
        digests = (await connection.execute(select(version_parents.c.digest))).scalars().all()
    assert sorted(digests) == sorted([one.digest, two.digest])
    await remove(store, other)


async def test_a_damaged_manifest_of_an_older_release_does_not_keep_every_version(
    store: Any, publish: Any
) -> None:
    one, two = await publish(seeds=(1, 2))

    async def forget(connection: Any) -> None:
        await connection.execute(insert(unread_lineages).from_select(["version_id"], select(versions.c.id)))

    await store.stores.database.write(forget)
    await store.stores.blobs.delete(one.digest)
    await remove(store, two)
    await remove(store, one)
    assert await numbers(store) == []


async def test_of_a_child_and_the_removal_of_its_parent_one_comes_too_late(
    store: Any, publish: Any, kit: Any
) -> None:
    for seed in range(3):
        (parent,) = await publish(name=f"parent-{seed}", seeds=(seed,))
        child = store.upload(kit.make_files(7 + seed), name="child", parents=[parent.digest])
        outcomes: Any = await asyncio.gather(child, remove(store, parent), return_exceptions=True)
        assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 1


async def test_a_version_becomes_the_newest_one_while_the_one_before_it_is_removed(
    store: Any, publish: Any
) -> None:
    (first,) = await publish(card=b"# First\n\nAbout invoices.\n")
    (second,) = await publish(seeds=(2,), card=b"# Second\n\nAbout receipts.\n")
    third = publish(seeds=(3,), card=b"# Third\n\nAbout ledgers.\n")
    await asyncio.gather(remove(store, second), remove(store, first), third)
    assert await listed(store) == [(3, 1)]
    assert await found(store, "ledgers") == ["acme/ner:v3"]
    assert await found(store, "receipts") == await found(store, "invoices") == []


@pytest.mark.parametrize("field", ["actor", "reason"])
async def test_who_and_why_are_bounded(store: Any, publish: Any, kit: Any, field: str) -> None:
    (first,) = await publish()
    async with kit.refused() as errors:
        await remove(store, first, **{field: "x" * 1025})
    assert errors[0].metadata["field"] == field
