"""The memory of a real store process does not grow with the bytes that pass through it."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.client import Publication, StoreClient
from tests.integration.store_process import Place, StoreProcess, adapter_files, upload_messages
from tests.s3_server import free_ports

MIB = 2**20
RANK = 128
SIZE = 8 * MIB
WEIGHTS = "adapter_model.safetensors"
# Of uploads and of downloads. More uploads than the store takes at a time: the others come again.
AT_ONCE = 25
PAUSE_SECONDS = 0.2
MOST_GROWTH = 64 * MIB
MANY = 50
# What gRPC reads ahead for each of three parts, parts on their way to S3, checks of two uploads.
MOST_FOR_MANY = 160 * MIB


def peak(store: StoreProcess) -> int:
    """The most memory that the process had since the last time it was asked for, in bytes."""
    folder = Path(f"/proc/{store.process.pid}")
    found = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
    assert found is not None
    (folder / "clear_refs").write_text("5")
    return int(found[1]) * 1024


async def upload(store: StoreProcess, seed: int) -> adapter_pb2.Version:
    files = await asyncio.to_thread(adapter_files, seed, RANK, ("q_proj", "v_proj"))
    while True:
        try:
            return (await store.stub.UploadAdapter(upload_messages(f"a{seed}", files))).version
        except grpc.aio.AioRpcError as error:
            # A refusal that crosses a message is lost (grpc/grpc#36066).
            lost = error.details() == "Internal error from Core"
            if not lost and error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


async def download(store: StoreProcess, version: adapter_pb2.Version) -> int:
    request = store_pb2.DownloadFileRequest(digest=version.digest, path=WEIGHTS)
    size = 0
    async for part in store.stub.DownloadFile(request):
        size += len(part.data)
    return size


async def wave(store: StoreProcess, number: int, version: adapter_pb2.Version) -> int:
    """Uploads and downloads at the same time; returns the peak."""
    uploads = (upload(store, number * AT_ONCE + index) for index in range(AT_ONCE))
    downloads = (download(store, version) for _ in range(AT_ONCE))
    _, sizes = await asyncio.gather(asyncio.gather(*uploads), asyncio.gather(*downloads))
    assert min(sizes) > SIZE
    return peak(store)


async def upload_in_parts(client: StoreClient, folder: Path, name: str) -> None:
    """Three parts of an upload are on their way at once."""
    publication = Publication("tiny")
    await client.upload(folder, f"acme/{name}", publication, in_parts=True, remember_in=folder / "memory")


def write_parts(folder: Path, seed: int) -> Path:
    """Two parts of 8 MiB and a small one."""
    folder.mkdir()
    for path, data in adapter_files(seed, 256, ("q_proj", "v_proj")).items():
        (folder / path).write_bytes(data)
    return folder


@pytest.mark.parametrize("backend", ["folder", "s3"])
async def test_memory_is_bounded_while_fifty_uploads_in_parts_run(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = {"PORT": str(free_ports(1)[0])}
    s3 = request.getfixturevalue("s3_server") if backend == "s3" else None
    store = await StoreProcess.start(replace(Place.new(tmp_path / "home", s3), settings=settings))
    try:
        await store.register()
        folder = await asyncio.to_thread(write_parts, tmp_path / "adapter", 1)
        async with StoreClient(f"127.0.0.1:{settings['PORT']}") as client:
            await upload_in_parts(client, folder, "warm")
            one = peak(store)
            # The same files under other names: what they hold makes no difference.
            names = [f"a{number}" for number in range(MANY)]
            await asyncio.gather(*(upload_in_parts(client, folder, name) for name in names))
            many = peak(store)
        print(f"{backend}: peaks of {one // MIB} and {many // MIB} MiB")
        assert many - one < MOST_FOR_MANY
    finally:
        store.kill()
        await store.gone()


@pytest.mark.parametrize("backend", ["folder", "s3"])
async def test_memory_stays_flat_while_many_uploads_and_downloads_run(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = Place.new(tmp_path, request.getfixturevalue("s3_server") if backend == "s3" else None)
    store = await StoreProcess.start(place)
    try:
        await store.register()
        # What one transfer of each kind brings is there once: code, threads, the heaps of the allocator.
        version = await upload(store, 0)
        await download(store, version)
        one = peak(store)
        first = await wave(store, 1, version)
        second = await wave(store, 2, version)
        print(f"{backend}: peaks of {one // MIB}, {first // MIB} and {second // MIB} MiB")
        assert first - one < MOST_GROWTH
        assert second - one < MOST_GROWTH
    finally:
        store.kill()
        await store.gone()
