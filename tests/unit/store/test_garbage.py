"""Collecting beside uploads, for both backends, and for two stores over one bucket."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.garbage import GarbageReport
from adaptermesh.store.stores import Stores

HOUR = 3600.0


class FastClock(SystemClock):
    """Goes ahead of the backend's clock: what was just put is hours old."""

    ahead = 0.0

    def wall(self) -> float:
        return super().wall() + self.ahead


async def put(stores: Stores, folder: Path, content: bytes) -> str:
    digest = digest_bytes(content)
    source = folder / "source"
    await asyncio.to_thread(source.write_bytes, content)
    await stores.blobs.put(digest, source)
    return digest


async def kept(stores: Stores) -> set[str]:
    return {blob.digest async for blob in stores.blobs.scan()}


async def downloads(store: Any, version: Any) -> dict[str, bytes]:
    found = {}
    for file in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=file.path)
        found[file.path] = b"".join([part.data async for part in store.stub.DownloadFile(request)])
    fetch = store_pb2.FetchAdapterRequest(digest=version.digest)
    data = [message.data async for message in store.stub.FetchAdapter(fetch)]
    assert sum(map(len, data)) == version.size_bytes
    return found


@pytest.fixture
async def store(either: Any, kit: Any) -> Any:
    async with kit.running_store(either) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        yield running


async def test_what_no_version_needs_goes_when_it_is_older_than_the_grace(
    store: Any, kit: Any, tmp_path: Path
) -> None:
    version = (await store.upload(kit.make_files())).version
    needed = await kept(store.stores)
    lost = await put(store.stores, tmp_path, b"never published")
    collect = store.stub.CollectGarbage

    young = await collect(store_pb2.CollectGarbageRequest())
    assert (young.removed_blobs, young.young_blobs, young.needed_blobs) == (0, 1, len(needed))
    everything = Duration()
    looked = await collect(store_pb2.CollectGarbageRequest(grace=everything, dry_run=True))
    assert (looked.removed_blobs, looked.removed_bytes) == (1, 15)
    assert await kept(store.stores) == needed | {lost}
    done = await collect(store_pb2.CollectGarbageRequest(grace=everything))
    assert (done.removed_blobs, done.removed_bytes, done.young_blobs) == (1, 15, 0)
    assert await kept(store.stores) == needed
    assert await downloads(store, version) == kit.make_files()
    again = await collect(store_pb2.CollectGarbageRequest(grace=everything))
    assert (again.removed_blobs, again.needed_blobs) == (0, len(needed))


async def test_the_grace_is_counted_from_when_a_blob_was_put(either: Any, tmp_path: Path) -> None:
    clock = FastClock()
    stores = Stores(either, clock)
    await stores.open()
    lost = await put(stores, tmp_path, b"lost")
    clock.ahead = 23 * HOUR
    assert (await stores.garbage.collect(24 * HOUR)).young_blobs == 1
    clock.ahead = 25 * HOUR
    assert (await stores.garbage.collect(24 * HOUR)).removed_blobs == 1
    assert lost not in await kept(stores)
    await stores.close()


@pytest.mark.parametrize("seconds", [-1, 20 * 365 * 24 * 3600])
async def test_a_grace_that_makes_no_sense_is_refused(store: Any, kit: Any, seconds: int) -> None:
    async with kit.refused() as errors:
        await store.stub.CollectGarbage(store_pb2.CollectGarbageRequest(grace=Duration(seconds=seconds)))
    assert (errors[0].code, errors[0].metadata["field"]) == (Code.INVALID_ARGUMENT, "grace")


async def test_one_collection_runs_at_a_time(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = store.stores.garbage
    marked, go_on, mark = asyncio.Event(), asyncio.Event(), garbage._mark

    async def slow() -> Any:
        marked.set()
        await go_on.wait()
        return await mark()

    monkeypatch.setattr(garbage, "_mark", slow)
    first = asyncio.create_task(garbage.collect(0))
    await marked.wait()
    with pytest.raises(MeshError) as caught:
        await garbage.collect(0)
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    go_on.set()
    assert (await first) == GarbageReport(dry_run=False)


async def test_a_blob_that_a_version_came_to_need_after_the_mark_stays(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = store.stores.garbage
    mark, published = garbage._mark, []

    async def publish_after_mark() -> Any:
        found = await mark()
        published.append((await store.upload(kit.make_files())).version)
        return found

    monkeypatch.setattr(garbage, "_mark", publish_after_mark)
    report = await garbage.collect(-HOUR)
    assert report.removed_blobs == 0
    assert await downloads(store, published[0]) == kit.make_files()


async def test_an_upload_whose_blobs_are_collected_before_it_is_published_puts_them_again(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = store.stores.catalogue
    publish = catalogue.publish
    collected: list[GarbageReport] = []

    async def collect_first(*arguments: Any) -> Any:
        if not collected:
            collected.append(await store.stores.garbage.collect(-HOUR))
        return await publish(*arguments)

    monkeypatch.setattr(catalogue, "publish", collect_first)
    answer = await store.upload(kit.make_files())
    assert collected[0].removed_blobs == len(await kept(store.stores)) > 0
    assert (answer.created, answer.version.number, answer.feed_position) == (True, 1, 2)
    assert await downloads(store, answer.version) == kit.make_files()
    assert [version.digest for version in (await store.snapshot()).versions] == [answer.version.digest]


async def test_an_upload_whose_blobs_vanish_each_time_is_refused_and_not_visible(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_blob = store.stores.blobs.put

    async def put_and_lose(digest: str, source: Path) -> None:
        await put_blob(digest, source)
        await store.stores.blobs.delete(digest)

    monkeypatch.setattr(store.stores.blobs, "put", put_and_lose)
    async with kit.refused() as errors:
        await store.upload(kit.make_files())
    assert errors[0].code is Code.UNAVAILABLE
    assert errors[0].retry_after
    assert not (await store.snapshot()).versions


async def test_collecting_without_grace_beside_the_uploads_of_two_stores_loses_nothing(
    s3_server: Any, kit: Any, config: Any, tmp_path: Path
) -> None:
    shared = replace(config, s3=s3_server.config())
    first_config = replace(shared, folder=tmp_path / "first")
    second_config = replace(shared, folder=tmp_path / "second")
    stop = asyncio.Event()

    async def collect(stores: Stores) -> int:
        removed = 0
        while not stop.is_set():
            removed += (await stores.garbage.collect(-HOUR)).removed_blobs
        return removed

    async with kit.running_store(first_config) as first, kit.running_store(second_config) as second:
        await first.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        collecting = [asyncio.create_task(collect(store.stores)) for store in (first, second)]
        names = [(store, f"a{index}") for index in range(6) for store in (first, second)]
        # The same content under several names, and a file that all have: they share blobs that are collected.
        answers = await asyncio.gather(
            *(
                store.upload(kit.make_files(index // 4), name=name)
                for index, (store, name) in enumerate(names)
            ),
            return_exceptions=True,
        )
        stop.set()
        await asyncio.gather(*collecting)
        versions = (await first.snapshot()).versions
        acknowledged = {answer.version.digest for answer in answers if not isinstance(answer, BaseException)}
        assert acknowledged
        assert acknowledged <= {version.digest for version in versions}
        for version in versions:
            for store in (first, second):
                found = await downloads(store, version)
                assert {path: digest_bytes(data) for path, data in found.items()} == {
                    file.path: file.digest for file in version.source_files
                }
        await first.stores.garbage.collect(-HOUR)
        report = await second.stores.garbage.collect(-HOUR)
        assert (report.removed_blobs, report.unfinished_uploads) == (0, 0)


async def test_a_store_that_starts_leaves_the_upload_of_another_alone(
    s3_server: Any, kit: Any, config: Any, tmp_path: Path
) -> None:
    shared = replace(config, s3=s3_server.config())
    first_config = replace(shared, folder=tmp_path / "first")
    second_config = replace(shared, folder=tmp_path / "second")
    async with kit.running_store(first_config) as first:
        await first.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        publish = first.stores.catalogue.publish
        started = []

        async def start_the_other(*arguments: Any) -> Any:
            before = await kept(first.stores)
            async with kit.running_store(second_config) as second:
                assert await kept(second.stores) == before
                started.append(len(before))
            return await publish(*arguments)

        first.stores.catalogue.publish = start_the_other
        answer = await first.upload(kit.make_files())
        assert started[0] > 0
        assert await downloads(first, answer.version) == kit.make_files()


async def test_a_start_sweeps_what_its_own_crash_left_though_the_bucket_is_shared(
    s3_server: Any, kit: Any, config: Any, tmp_path: Path
) -> None:
    shared = replace(config, s3=s3_server.config())
    first_config = replace(shared, folder=tmp_path / "first")
    async with kit.running_store(first_config) as first:
        await first.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        await first.upload(kit.make_files())
        needed = await kept(first.stores)
        lost = await put(first.stores, tmp_path, b"never published")
        other = await put(first.stores, tmp_path, b"of another store")
        place = first.stores.staging.place()
        await place.intend([lost, *needed])
    async with kit.running_store(first_config) as first:
        assert await kept(first.stores) == needed | {other}


async def test_unfinished_puts_are_collected_with_the_rest(store: Any, tmp_path: Path) -> None:
    if store.config.s3 is None:
        (store.config.folder / "blobs" / "tmp" / "half").write_bytes(b"half")
    else:
        client = store.stores.blobs._client
        key = store.stores.blobs._key(digest_bytes(b"half"))
        client._create_multipart_upload(store.config.s3.bucket, key, {})
    assert (await store.stores.garbage.collect(HOUR)).unfinished_uploads == 0
    assert (await store.stores.garbage.collect(-HOUR, dry_run=True)).unfinished_uploads == 1
    assert (await store.stores.garbage.collect(-HOUR)).unfinished_uploads == 1
    assert await store.stores.blobs.unfinished(time.time() + HOUR) == 0
