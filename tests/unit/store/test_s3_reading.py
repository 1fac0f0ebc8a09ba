"""Downloads straight from a bucket."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2

READERS = 20
VOCABULARY = b"0123456789abcdef" * 2**19


@pytest.fixture
async def store(s3_server: Any, config: Any, kit: Any) -> Any:
    async with kit.running_store(replace(config, s3=replace(s3_server.config(), read_threads=2))) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        yield running


@pytest.fixture
async def request_(store: Any, kit: Any) -> store_pb2.DownloadFileRequest:
    files = {**kit.make_files(), "vocab.txt": VOCABULARY}
    version = (await store.upload(files, piece=2**19)).version
    return store_pb2.DownloadFileRequest(digest=version.digest, path="vocab.txt")


async def read(store: Any, request: store_pb2.DownloadFileRequest) -> bytes:
    return b"".join([part.data async for part in store.stub.DownloadFile(request)])


async def test_a_download_begins_at_any_offset(store: Any, request_: store_pb2.DownloadFileRequest) -> None:
    for offset in (0, 1, 2**20 - 1, 2**21 + 5, len(VOCABULARY) - 1, len(VOCABULARY)):
        request = store_pb2.DownloadFileRequest(digest=request_.digest, path="vocab.txt", offset=offset)
        assert await read(store, request) == VOCABULARY[offset:]


async def test_readers_that_stop_reading_slow_only_themselves_and_leave_nothing_when_they_go(
    store: Any, request_: store_pb2.DownloadFileRequest, kit: Any
) -> None:
    """There are many more of them than threads that read."""
    stuck = [store.stub.DownloadFile(request_) for _ in range(READERS)]
    for call in stuck:
        assert (await call.read()).data
    downloads = await asyncio.gather(*(read(store, request_) for _ in range(3)))
    assert downloads == [VOCABULARY] * 3
    for call in stuck:
        call.cancel()
    connection = store.stores.blobs._connection
    (pool,) = (connection._http.pools.get(key) for key in connection._http.pools.keys())  # noqa: SIM118
    # Every connection that was opened is back where the next request takes it from.
    await kit.until(lambda: sum(one is not None for one in pool.pool.queue) == pool.num_connections)
    assert (
        pool.num_connections
        <= connection.config.read_threads + connection.config.look_threads + connection.config.write_threads
    )
    assert await read(store, request_) == VOCABULARY
