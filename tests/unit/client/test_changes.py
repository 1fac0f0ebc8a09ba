"""The change feed as a client follows it, over a store that comes and goes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import CHANGE_KINDS, Change, Code, FeedPlace, MeshError, Reason, StoreClient, Version
from tests.unit.client.fake_services import fake_store, serve
from tests.unit.store.conftest import (
    RunningStore,
    base_model,
    make_files,
    running_store,
    store_config,
)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[RunningStore]:
    async with running_store(store_config(tmp_path / "store")) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        yield running


@pytest.fixture
async def client(store: RunningStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.target) as client:
        yield client


async def collected(changes: AsyncIterator[Change]) -> list[Change]:
    return [change async for change in changes]


async def test_every_kind_of_change_comes_with_what_it_is_about(
    store: RunningStore, client: StoreClient
) -> None:
    start = FeedPlace((await client.feed_head()).feed_id, 0)
    first = (await store.upload(make_files(1))).version
    await store.upload(make_files(2))
    await client.set_alias("acme/ner@prod", "v2")
    await client.set_route("ner", "acme/ner@prod")
    await client.delete_route("ner")
    await client.delete_alias("acme/ner@prod")
    await client.delete_version((await client.resolve("acme/ner:v1")).version, reason="wrong")
    found = await collected(client.changes(start, follow=False))
    assert [change.position for change in found] == list(range(1, 9))
    kinds = ["base_model_registered", "version_published", "version_published", "alias_set", "route_set"]
    assert [change.kind for change in found] == [*kinds, "route_deleted", "alias_deleted", "version_deleted"]
    assert isinstance(found[1].record, Version)
    assert found[1].record.digest == first.digest
    assert all(change.time is not None for change in found)
    shown = await collected(client.snapshot())
    assert {(change.position, change.time) for change in shown} == {(8, None)}
    assert [change.kind for change in shown] == [
        "base_model_registered",
        "version_published",
        "version_deleted",
    ]


def test_every_kind_of_the_protocol_is_known() -> None:
    fields = store_pb2.Change.DESCRIPTOR.oneofs_by_name["event"].fields
    assert sorted(field.name for field in fields) == sorted(CHANGE_KINDS)


async def test_a_follower_hears_of_what_changes_later(store: RunningStore, client: StoreClient) -> None:
    async with aclosing(client.changes(await client.feed_head())) as changes:
        waiting = asyncio.ensure_future(anext(changes))
        await store.upload(make_files(1))
        assert (await waiting).kind == "version_published"


async def test_a_position_of_another_feed_is_refused(client: StoreClient) -> None:
    for place in (FeedPlace("another", 0), FeedPlace((await client.feed_head()).feed_id, 99)):
        with pytest.raises(MeshError) as caught:
            await collected(client.changes(place))
        assert caught.value.reason is Reason.FEED_POSITION_EXPIRED


class Breaking:
    """Gives one change a connection, and breaks it in one way or another."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def watch(self, request: Any, context: Any) -> Any:
        self.asked.append(request.after_position)
        change = store_pb2.Change(position=request.after_position + 1)
        yield store_pb2.WatchChangesResponse(head_position=9, change=change)
        if len(self.asked) % 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


async def test_a_lost_connection_goes_on_from_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, servicer = Breaking(), fake_store()
    monkeypatch.setattr(servicer, "WatchChanges", breaking.watch)
    losses: list[MeshError] = []
    async with serve(servicer) as target, StoreClient(target) as client:
        found = await collected(client.changes(FeedPlace("feed", 5), follow=False, on_loss=losses.append))
    assert [change.position for change in found] == [6, 7, 8, 9]
    assert (breaking.asked, len(losses)) == ([5, 6, 7, 8], 3)
    # What a newer store says is passed on as what it is.
    assert {(change.kind, change.record) for change in found} == {("unknown", None)}


async def test_a_store_that_is_not_there_is_an_error_at_once() -> None:
    async with StoreClient("127.0.0.1:9") as client:
        with pytest.raises(MeshError) as caught:
            await client.feed_head()
        assert caught.value.code is Code.UNAVAILABLE
        with pytest.raises(MeshError) as caught:
            await collected(client.changes(FeedPlace("feed", 0)))
        assert caught.value.code is Code.UNAVAILABLE
