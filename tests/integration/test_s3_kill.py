"""kill -9 of the S3 server under two stores that share its bucket, in the middle of uploads and downloads."""

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.errors import Code, Reason
from adaptermesh.rpc.status import mesh_error_from
from tests.integration.store_process import (
    Place,
    StoreProcess,
    assert_whole,
    large_files,
    upload_messages,
)
from tests.s3_server import S3Server, s3_server

KILLS = 4
AT_ONCE = 3


@pytest.fixture
def fragile_server(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as server:
        yield server


class Traffic:
    """Uploads and downloads without an end, until they are told to stop."""

    def __init__(self, stores: list[StoreProcess]) -> None:
        self._stores = stores
        self._stopping = asyncio.Event()
        self.files: dict[str, dict[str, bytes]] = {}
        self.acknowledged: dict[str, adapter_pb2.Version] = {}
        self.downloads = 0
        self.refusals = 0

    def stop(self) -> None:
        self._stopping.set()

    async def upload(self, lane: int) -> None:
        """One after another, each until it is acknowledged."""
        store, number = self._stores[lane % len(self._stores)], 0
        while not self._stopping.is_set():
            name, number = f"lane{lane}-{number}", number + 1
            self.files[name] = large_files(lane * 1000 + number)
            while name not in self.acknowledged and not self._stopping.is_set():
                try:
                    messages = upload_messages(name, self.files[name])
                    self.acknowledged[name] = (await store.stub.UploadAdapter(messages)).version
                except grpc.aio.AioRpcError as error:
                    await self._refused(error)

    async def download(self, lane: int) -> None:
        store = self._stores[lane % len(self._stores)]
        while not self._stopping.is_set():
            for name, version in list(self.acknowledged.items()):
                try:
                    await assert_whole(store, version, self.files[name])
                    self.downloads += 1
                except grpc.aio.AioRpcError as error:
                    await self._refused(error)
            await asyncio.sleep(0.01)

    async def _refused(self, error: grpc.aio.AioRpcError) -> None:
        if error.details() == "Internal error from Core":
            # A refusal that crossed a message (grpc/grpc#36066).
            return
        found = mesh_error_from(error)
        assert (found.code, found.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE), found
        assert found.retry_after
        self.refusals += 1
        await asyncio.sleep(0.05)


async def test_kill_9_of_the_s3_server_loses_nothing_acknowledged_and_leaks_nothing(
    fragile_server: S3Server, tmp_path: Path
) -> None:
    first = Place.new(tmp_path / "first", fragile_server)
    # Its own folder, but the same bucket and catalogue.
    second = Place(tmp_path / "second", fragile_server, first.prefix, first.catalogue)
    for place in (first, second):
        place.home.mkdir()
    stores = [await StoreProcess.start(first)]
    moments = random.Random(os.getpid())
    try:
        stores.append(await StoreProcess.start(second))
        await stores[0].register()
        traffic = Traffic(stores)
        async with asyncio.TaskGroup() as group:
            for lane in range(AT_ONCE):
                group.create_task(traffic.upload(lane))
                group.create_task(traffic.download(lane))
            for _ in range(KILLS):
                # The moment of the kill is what the test is about; nothing is waited for.
                await asyncio.sleep(moments.uniform(1, 3))
                await asyncio.to_thread(fragile_server.kill)
                before = traffic.refusals
                async with asyncio.timeout(60):
                    while traffic.refusals == before:  # noqa: ASYNC110  # each has its own task
                        await asyncio.sleep(0.01)
                await asyncio.to_thread(fragile_server.start)
            traffic.stop()
        print(
            f"{len(traffic.acknowledged)} uploads, {traffic.downloads} downloads, {traffic.refusals} refusals"
        )
        await assert_all_there(stores, traffic, first)
    finally:
        for store in stores:
            store.kill()
            await store.gone()


async def assert_all_there(stores: list[StoreProcess], traffic: Traffic, place: Place) -> None:
    """Every acknowledged version is whole at both stores, and after a collection nothing else is left."""
    assert traffic.acknowledged
    versions = {version.name: version for version in await stores[0].versions()}
    assert traffic.acknowledged.keys() <= versions.keys()
    needed: set[str] = set()
    for name, version in versions.items():
        for store in stores:
            needed |= await assert_whole(store, version, traffic.files[name])
        checks = stores[0].stub.VerifyBlobs(store_pb2.VerifyBlobsRequest(digest=version.digest))
        assert [check.problem async for check in checks if check.problem] == []
    await stores[1].collect()
    assert await asyncio.to_thread(place.blobs) == needed
    report = await stores[0].collect()
    assert (report.removed_blobs, report.unfinished_uploads) == (0, 0)
