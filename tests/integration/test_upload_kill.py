"""kill -9 of real stores during uploads in parts: what was acknowledged is there, and the upload goes on."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Progress, Publication, StoreClient, UploadResult
from adaptermesh.core.digests import digest_bytes
from tests.integration.store_process import (
    Place,
    StoreProcess,
    adapter_files,
    assert_whole,
    large_files,
    upload_header,
)
from tests.postgres import PostgresServer, running_postgres
from tests.s3_server import BUCKET, S3Server, free_ports

PART = 512 * 1024
PIECE = 64 * 1024
KILLS = 4
DATABASE = "mesh"

Range = tuple[int, int]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place.new(tmp_path, request.getfixturevalue("s3_server") if request.param == "s3" else None)


@dataclass
class Sender:
    """A client that notes what was acknowledged."""

    files: Mapping[str, bytes]
    name: str
    upload_id: str = ""
    acknowledged: set[tuple[str, int, int]] = field(default_factory=set)

    async def begin(self, store: StoreProcess) -> None:
        header = upload_header(self.name, dict(self.files))
        begun = await store.stub.BeginUpload(store_pb2.BeginUploadRequest(header=header))
        self.upload_id = begun.upload_id

    async def received(self, store: StoreProcess) -> dict[str, list[Range]]:
        found = await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id=self.upload_id))
        return {
            file.path: [(one.offset, one.offset + one.size_bytes) for one in file.ranges]
            for file in found.files
        }

    def missing(self, received: Mapping[str, list[Range]]) -> list[tuple[str, int, int]]:
        """By a grid, of which a part is there as a whole or not at all."""
        return [
            (path, start, min(start + PART, len(data)))
            for path, data in self.files.items()
            for start in range(0, len(data), PART)
            if not any(begin <= start < end for begin, end in received[path])
        ]

    async def part(self, store: StoreProcess, path: str, start: int, end: int) -> None:
        data = self.files[path][start:end]
        header = store_pb2.PartHeader(
            upload_id=self.upload_id,
            path=path,
            offset=start,
            size_bytes=len(data),
            digest=digest_bytes(data),
        )

        async def messages() -> AsyncIterator[store_pb2.UploadPartRequest]:
            yield store_pb2.UploadPartRequest(header=header)
            for at in range(0, len(data), PIECE):
                yield store_pb2.UploadPartRequest(data=data[at : at + PIECE])

        await store.stub.UploadPart(messages(), timeout=30)
        self.acknowledged.add((path, start, end))

    def has(self, parts: int) -> bool:
        return len(self.acknowledged) >= parts

    def check(self, received: Mapping[str, list[Range]]) -> None:
        for path, start, end in self.acknowledged:
            assert any(begin <= start and end <= stop for begin, stop in received[path]), (path, start)


async def reached(work: asyncio.Future[Any], true: Callable[[], Any]) -> None:
    """Waits for something that gives no event, or for the end of the work; not for ever."""
    async with asyncio.timeout(60):
        while not work.done() and not true():  # noqa: ASYNC110 (as it says)
            await asyncio.sleep(0.001)


def seen_in(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def part_names(place: Place) -> set[str]:
    """What lies in the place of parts; blocks."""
    if place.s3 is None:
        folder = place.home / "store" / "parts"
        return {path.name for path in folder.rglob("*") if path.is_file()}
    prefix = f"{place.prefix}/parts/sha256/"
    objects = place.s3.client().list_objects(BUCKET, prefix=prefix, recursive=True)
    return {str(entry.object_name) for entry in objects}


async def test_acknowledged_parts_survive_kill_9_and_the_upload_is_completed(place: Place) -> None:
    moments = random.Random(7)
    sender = Sender(large_files(1), "resumed")
    store = await StoreProcess.start(place)
    try:
        await store.register()
        await sender.begin(store)
        for _ in range(KILLS):
            wanted = sender.missing(await sender.received(store))
            left = moments.randint(1, len(wanted) // 2)
            sending = asyncio.gather(
                *(sender.part(store, *part) for part in moments.sample(wanted, len(wanted))),
                return_exceptions=True,
            )
            enough = len(sender.acknowledged) + left
            await reached(sending, partial(sender.has, enough))
            store.kill()
            await sending
            await store.gone()
            store = await StoreProcess.start(place)
            sender.check(await sender.received(store))
        for part in sender.missing(await sender.received(store)):
            await sender.part(store, *part)
        request = store_pb2.CompleteUploadRequest(upload_id=sender.upload_id)
        done = await store.stub.CompleteUpload(request)
        assert (done.created, done.version.number) == (True, 1)
        needed = await assert_whole(store, done.version, dict(sender.files))
        await store.collect()
        assert await asyncio.to_thread(part_names, place) == set()
        assert {name for name in await asyncio.to_thread(place.blobs) if name in needed} == needed
    finally:
        store.kill()
        await store.gone()


async def test_kill_9_while_an_upload_is_completed_loses_nothing(place: Place) -> None:
    store = await StoreProcess.start(place)
    try:
        await store.register()
        for seed, pattern in enumerate(("*/source-000", "*/canonical.safetensors", "*/intended-blobs")):
            sender = Sender(adapter_files(seed), f"killed-{seed}")
            await sender.begin(store)
            for part in sender.missing({path: [] for path in sender.files}):
                await sender.part(store, *part)
            request = store_pb2.CompleteUploadRequest(upload_id=sender.upload_id)
            completing = asyncio.ensure_future(store.stub.CompleteUpload(request))
            await reached(completing, partial(seen_in, place.staging, pattern))
            store.kill()
            outcome = (await asyncio.gather(completing, return_exceptions=True))[0]
            await store.gone()
            store = await StoreProcess.start(place)
            done = await store.stub.CompleteUpload(request)
            assert done.version.number == 1
            if isinstance(outcome, store_pb2.CompleteUploadResponse):
                assert outcome.version == done.version
            await assert_whole(store, done.version, dict(sender.files))
        await store.collect()
        assert await asyncio.to_thread(part_names, place) == set()
    finally:
        store.kill()
        await store.gone()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return folder


async def uploading(client: StoreClient, folder: Path, memory: Path, half: asyncio.Event) -> UploadResult:
    """Says when half of it is on its way."""

    def on_bytes(progress: Progress) -> None:
        if progress.done_bytes * 2 > progress.total_bytes:
            half.set()

    return await client.upload(
        folder, "acme/big", Publication("tiny"), remember_in=memory, progress=on_bytes, in_parts=True
    )


async def test_the_sdk_goes_on_by_itself_when_the_store_is_killed_and_comes_back(tmp_path: Path) -> None:
    files = adapter_files(3, 512, ("q_proj", "v_proj"))
    folder = await asyncio.to_thread(write, tmp_path / "adapter", files)
    place = replace(Place.new(tmp_path / "home"), settings={"PORT": str(free_ports(1)[0])})
    store = await StoreProcess.start(place)
    try:
        await store.register()
        half = asyncio.Event()
        async with StoreClient(f"127.0.0.1:{place.settings['PORT']}") as client:
            sending = asyncio.create_task(uploading(client, folder, tmp_path / "memory", half))
            await half.wait()
            store.kill()
            await store.gone()
            store = await StoreProcess.start(place)
            done = await sending
        assert (done.created, done.version.number) == (True, 1)
        (version,) = await store.versions()
        await assert_whole(store, version, files)
        assert await asyncio.to_thread(part_names, place) == set()
    finally:
        store.kill()
        await store.gone()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with running_postgres(durable=False) as server:
        server.sql(f"CREATE DATABASE {DATABASE}")
        yield server


async def test_an_upload_goes_on_at_another_store_of_the_database_and_bucket(
    server: PostgresServer, s3_server: S3Server, tmp_path: Path
) -> None:
    files = adapter_files(4, 512, ("q_proj", "v_proj"))
    folder = await asyncio.to_thread(write, tmp_path / "adapter", files)
    first = Place.new(tmp_path / "0", s3_server)
    ports = free_ports(2)
    places = [
        replace(
            first, home=tmp_path / str(one), database_url=server.url(DATABASE), settings={"PORT": str(port)}
        )
        for one, port in enumerate(ports)
    ]
    stores = [await StoreProcess.start(place) for place in places]
    try:
        await stores[0].register()
        half = asyncio.Event()
        async with StoreClient("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)) as client:
            sending = asyncio.create_task(uploading(client, folder, tmp_path / "memory", half))
            await half.wait()
            stores[0].kill()
            done = await sending
        assert (done.created, done.version.number) == (True, 1)
        (version,) = await stores[1].versions()
        await assert_whole(stores[1], version, files)
        # What the dead store had put and not acknowledged goes as well.
        await stores[1].collect()
        assert await asyncio.to_thread(part_names, places[1]) == set()
    finally:
        for store in stores:
            store.kill()
            await store.gone()


async def test_an_unknown_upload_is_unknown_at_every_store(tmp_path: Path) -> None:
    store = await StoreProcess.start(Place.new(tmp_path))
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id="guess"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    finally:
        store.kill()
        await store.gone()
