"""The memory of a real store process does not grow with the bytes that pass through it."""

import asyncio
import re
from pathlib import Path

import grpc
import grpc.aio
import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from tests.integration.store_process import Place, StoreProcess, adapter_files, upload_messages

MIB = 2**20
RANK = 128
SIZE = 8 * MIB
WEIGHTS = "adapter_model.safetensors"
# Of uploads and of downloads. More uploads than the store takes at a time: the others come again.
AT_ONCE = 25
PAUSE_SECONDS = 0.2
MOST_GROWTH = 64 * MIB


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
