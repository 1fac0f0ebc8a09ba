"""kill -9 of a real store process at many points of an upload, with its blobs in a folder and in a bucket."""

import asyncio
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from adaptermesh.api.store.v1 import store_pb2
from tests.integration.store_process import (
    PIECE,
    Place,
    StoreProcess,
    adapter_files,
    assert_whole,
    large_files,
    upload_messages,
)

ROUNDS = 6
AT_ONCE = 4


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A home, and a part of a bucket if the blobs shall be there."""
    return Place.new(tmp_path, request.getfixturevalue("s3_server") if request.param == "s3" else None)


@dataclass(frozen=True)
class KillPoint:
    """When to kill: the upload has stopped after so many messages, or goes on to its end (None)."""

    name: str
    reached: Callable[[Place, set[str]], Any]
    stop_after: int | None = None


POINTS = (
    KillPoint("header", lambda place, _: list(place.staging.glob("*/source-000")), 1),
    KillPoint("half", lambda place, _: sizes(place.staging, "source-001") >= 4 * PIECE, 12),
    KillPoint("all-but-the-end", lambda place, _: sizes(place.staging, "source-001") >= 14 * PIECE, -1),
    KillPoint("received", lambda place, _: list(place.staging.glob("*/canonical.safetensors"))),
    KillPoint("checked", lambda place, _: list(place.staging.glob("*/manifest.json"))),
    KillPoint("keeping", lambda place, _: list(place.staging.glob("*/intended-blobs"))),
    KillPoint("kept-one", lambda place, before: place.blobs() - before),
    KillPoint("never", lambda _place, _before: False),
)


def sizes(staging: Path, name: str) -> int:
    return sum(path.stat().st_size for path in staging.glob(f"*/{name}"))


def kill_when(store: StoreProcess, point: KillPoint, before: set[str], uploaded: Callable[[], bool]) -> None:
    """Kills the store when the point is reached, or after the upload if it was too quick to be seen."""
    deadline = time.monotonic() + 30
    while not uploaded() and time.monotonic() < deadline:
        try:
            if point.reached(store.place, before):
                break
        except FileNotFoundError:
            # The store moves files while they are listed.
            continue
    store.kill()


async def upload_and_kill(store: StoreProcess, point: KillPoint, files: dict[str, bytes]) -> bool:
    """Returns whether the upload was acknowledged."""
    before = await asyncio.to_thread(store.place.blobs)
    call = store.stub.UploadAdapter(upload_messages(point.name, files, point.stop_after))
    uploading = asyncio.ensure_future(call)
    await asyncio.to_thread(kill_when, store, point, before, uploading.done)
    outcome = (await asyncio.gather(uploading, return_exceptions=True))[0]
    await store.gone()
    return isinstance(outcome, store_pb2.UploadAdapterResponse)


async def test_kill_9_during_an_upload_leaves_no_half_version_and_a_repetition_works(place: Place) -> None:
    store = await StoreProcess.start(place)
    try:
        await store.register()
        needed: set[str] = set()
        for seed, point in enumerate(POINTS):
            files = adapter_files(seed)
            acknowledged = await upload_and_kill(store, point, files)
            store = await StoreProcess.start(place)
            found = [version for version in await store.versions() if version.name == point.name]
            assert len(found) <= 1
            assert found or not acknowledged, point.name
            for version in found:
                needed |= await assert_whole(store, version, files)
            assert list(place.staging.iterdir()) == [], point.name
            assert await asyncio.to_thread(place.blobs) == needed, point.name
            again = await store.stub.UploadAdapter(upload_messages(point.name, files))
            assert (again.version.number, again.created) == (1, not found), point.name
            needed |= await assert_whole(store, again.version, files)
        assert [version.name for version in await store.versions()] == [point.name for point in POINTS]
    finally:
        store.kill()
        await store.gone()


async def upload_many_and_kill(
    store: StoreProcess, uploads: dict[str, dict[str, bytes]], seconds: float
) -> set[str]:
    """Kills the store so long after the uploads have begun; returns which ones were acknowledged."""
    calls = {name: store.stub.UploadAdapter(upload_messages(name, files)) for name, files in uploads.items()}
    waiting = asyncio.gather(*calls.values(), return_exceptions=True)
    # The moment of the kill is what the test is about; nothing is waited for.
    await asyncio.wait([waiting], timeout=seconds)
    store.kill()
    outcomes = await waiting
    await store.gone()
    failures = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    # The connection was lost; while it sends, grpc.aio says so in its own way (grpc/grpc#36066).
    assert all(
        failure.code() is grpc.StatusCode.UNAVAILABLE or failure.details() == "Internal error from Core"
        for failure in failures
    ), failures
    done = zip(calls, outcomes, strict=True)
    return {name for name, outcome in done if isinstance(outcome, store_pb2.UploadAdapterResponse)}


async def test_kill_9_at_random_moments_of_many_uploads_loses_nothing_acknowledged(place: Place) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    known: dict[str, dict[str, bytes]] = {}
    acknowledged: set[str] = set()
    store = await StoreProcess.start(place)
    try:
        await store.register()
        start = time.monotonic()
        warm = {"warm": large_files(10**6)}
        acknowledged |= await upload_many_and_kill(store, warm, 30)
        assert acknowledged == {"warm"}
        known |= warm
        whole_seconds = time.monotonic() - start
        for number in range(ROUNDS):
            store = await StoreProcess.start(place)
            uploads = {f"r{number}-{one}": large_files(number * AT_ONCE + one) for one in range(AT_ONCE)}
            known |= uploads
            seconds = moments.uniform(0, AT_ONCE * whole_seconds)
            acknowledged |= await upload_many_and_kill(store, uploads, seconds)
        store = await StoreProcess.start(place)
        versions = await store.versions()
        needed: set[str] = set()
        for version in versions:
            needed |= await assert_whole(store, version, known[version.name])
        print(f"{len(acknowledged)} of {len(known)} acknowledged, {len(versions)} visible")
        assert acknowledged <= {version.name for version in versions}
        await store.collect()
        assert await asyncio.to_thread(place.blobs) == needed
        report = await store.collect()
        assert (report.removed_blobs, report.unfinished_uploads) == (0, 0)
    finally:
        store.kill()
        await store.gone()


async def test_sigterm_ends_the_store_cleanly_with_watchers_connected(tmp_path: Path) -> None:
    store = await StoreProcess.start(Place.new(tmp_path))
    parts = [part async for part in store.stub.GetSnapshot(store_pb2.GetSnapshotRequest())]
    watch = store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=parts[0].feed_id))
    await watch.read()
    store.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await watch.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await store.gone()
    assert store.process.returncode == 0
