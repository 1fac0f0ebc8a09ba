from contextlib import suppress
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, MeshError
from adaptermesh.store.records import RouteRecord, RouteTarget
from adaptermesh.store.snapshot import SnapshotConfig, SnapshotItem, Snapshots


async def test_an_empty_catalogue_has_a_snapshot_at_position_0(empty_store: Any) -> None:
    snapshot = await empty_store.snapshot()
    assert snapshot.feed_position == 0
    assert len(snapshot.feed_id) == 36
    assert not snapshot.base_models


async def test_a_snapshot_has_everything_as_it_is_now(store: Any, publish: Any, kit: Any) -> None:
    versions = await publish(seeds=(1, 2))
    for number in (1, 2):
        request = store_pb2.SetAliasRequest(namespace="acme", name="ner", alias="prod", version_number=number)
        alias = (await store.stub.SetAlias(request)).alias
    snapshot = await store.snapshot()
    assert snapshot.feed_position == 5
    assert list(snapshot.base_models) == [kit.base_model()]
    assert list(snapshot.versions) == versions
    assert list(snapshot.aliases) == [alias]


async def test_a_large_snapshot_comes_in_parts_of_bounded_size(store: Any, kit: Any) -> None:
    for number in range(20):
        base = kit.base_model(f"large-{number}", str(number))
        base.config_json = base.config_json[:-1] + " " * 60_000 + "}"
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    parts = [part async for part in store.stub.GetSnapshot(store_pb2.GetSnapshotRequest())]
    assert len(parts) > 1
    assert sum(len(part.base_models) for part in parts) == 21
    assert all(part.ByteSize() < 2**20 for part in parts)
    assert {(part.feed_id, part.feed_position) for part in parts} == {(parts[0].feed_id, 21)}


async def test_a_snapshot_shows_one_position_while_others_write(store: Any, kit: Any) -> None:
    items = store.stores.snapshots.read()
    first = await anext(items)
    other = kit.base_model("late", "late")
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=other))
    rest = [item async for item in items]
    assert first.feed_position == 1
    assert [item.record.model_id for item in rest] == ["tiny-llama"]
    assert (await store.snapshot()).feed_position == 2


async def test_a_reader_that_is_stuck_loses_its_transaction_to_the_next_one(store: Any) -> None:
    for number in range(100):
        route = RouteRecord("*", f"task-{number}", (RouteTarget("base", 1, ""),), 0, 0)
        await store.stores.routes.set(route, None)
    snapshots = Snapshots(store.stores.database, SnapshotConfig(concurrent=1, seconds=0.2))
    stuck = snapshots.read()
    await anext(stuck)
    items: list[SnapshotItem] = []
    while not items:
        with suppress(MeshError):
            items = [item async for item in snapshots.read()]
    assert len(items) == 102
    with pytest.raises(MeshError) as caught:
        _ = [item async for item in stuck]
    assert caught.value.code is Code.DEADLINE_EXCEEDED
