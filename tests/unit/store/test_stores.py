import asyncio
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.stores import FolderLock, Stores


async def test_a_restarted_store_has_everything_and_goes_on_counting(config: Any, kit: Any) -> None:
    async with kit.running_store(config) as store:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        first = (await store.upload(kit.make_files(1))).version
        await store.stub.SetAlias(
            store_pb2.SetAliasRequest(namespace="acme", name="ner", alias="prod", version_number=1)
        )
        target = adapter_pb2.RouteTarget(ref="acme/ner@prod", weight=1)
        route = adapter_pb2.Route(tenant="*", task="ner", targets=[target])
        await store.stub.SetRoute(store_pb2.SetRouteRequest(route=route))
        before = await store.snapshot()
    async with kit.running_store(config) as store:
        assert await store.snapshot() == before
        again = await store.upload(kit.make_files(1))
        assert (again.created, again.version) == (False, first)
        second = await store.upload(kit.make_files(2))
        assert (second.version.number, second.feed_position) == (2, 5)
        request = store_pb2.FetchAdapterRequest(digest=first.digest)
        data = b"".join([message.data async for message in store.stub.FetchAdapter(request)])
        assert len(data) == first.size_bytes
        watch = store.stub.WatchChanges(
            store_pb2.WatchChangesRequest(feed_id=before.feed_id, after_position=4)
        )
        assert (await watch.read()).change.version_published == second.version
        watch.cancel()


async def test_a_start_removes_what_a_crash_left_and_nothing_else(config: Any, kit: Any) -> None:
    async with kit.running_store(config) as store:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        await store.upload(kit.make_files(1))
        kept = store.left_files()
        # An upload that had kept its blobs and not yet published its version.
        place = store.stores.staging.place()
        source = config.folder / "source"
        source.write_bytes(b"never published")
        orphan = digest_bytes(b"never published")
        shared = (await store.snapshot()).versions[0].source_files[0].digest
        await place.intend([orphan, shared, "sha256:cut"])
        await store.stores.blobs.put(orphan, source)
        (config.folder / "staging" / "half").mkdir()
        (config.folder / "staging" / "half" / "source-000").write_bytes(b"half")
        (config.folder / "blobs" / "tmp" / "half").write_bytes(b"half")
        assert len(store.left_files()) == len(kept) + 4
    async with kit.running_store(config) as store:
        assert store.left_files() == kept


async def test_an_upload_that_fails_while_publishing_is_swept_at_the_next_start(
    config: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kit.running_store(config) as store:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))

        async def fail(*_: object) -> None:
            raise RuntimeError("no commit")

        monkeypatch.setattr(store.stores.catalogue, "publish", fail)
        async with kit.refused() as errors:
            await store.upload(kit.make_files())
        assert errors[0].code is Code.INTERNAL
        assert not (await store.snapshot()).versions
        left = [Path(path) for path in store.left_files()]
        assert {path.name for path in left if "staging" in path.parts} == {"intended-blobs"}
    async with kit.running_store(config) as store:
        assert store.left_files() == []
        assert (await store.upload(kit.make_files())).created


async def test_two_stores_never_run_on_one_folder(config: Any, kit: Any) -> None:
    async with kit.running_store(config):
        second = Stores(config, SystemClock())
        with pytest.raises(MeshError) as caught:
            await second.open()
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
        await second.close()


async def test_a_folder_that_is_let_go_of_is_taken_by_who_waits(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "lock"), FolderLock(tmp_path / "lock")
    await first.take(0)
    waiting = asyncio.create_task(second.take(30))
    await asyncio.sleep(0)
    first.release()
    await waiting
    second.release()


async def test_a_call_before_the_store_is_open_is_told_to_come_back(config: Any) -> None:
    stores = Stores(config, SystemClock())
    with pytest.raises(MeshError) as caught:
        stores.check_open()
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_after
    await stores.close()
