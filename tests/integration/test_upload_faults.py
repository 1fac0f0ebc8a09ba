"""kill -9 of stores, of PostgreSQL and of the S3 server at random points of many uploads.

What holds afterwards, of S uploads that were begun:
- what was acknowledged is visible, under the number and the digest that were told, and whole at every store;
- of the rest only that is visible, and whole, whose client lost the connection or the database before the
  answer: it can't be told from outside whether its publication had been committed by then;
- what was cut short, and what a store refused before publishing, is never visible;
- the versions of an adapter are numbered without gaps, and every ref resolves to its digest at every store;
- watchers at every store, across all outages, saw each position of the feed once, in order, and the same;
- after a collection without grace the backend has exactly the blobs that visible versions need.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from tests.integration.fragile_processes import Replica, Server
from tests.integration.store_process import Place, assert_whole
from tests.integration.upload_storm import (
    Storm,
    StormConfig,
    Told,
    Watcher,
    first_part,
    retried,
    versions_by_upload,
)
from tests.postgres import PostgresServer, running_postgres
from tests.s3_server import S3Server, s3_server

DATABASE = "mesh"
FEW = 120
MANY = 500


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """One that may be killed, and whose commits wait for the disk."""
    with running_postgres(durable=True) as server:
        server.sql(f"CREATE DATABASE {DATABASE}")
        yield server


@pytest.fixture
def fragile_s3(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as server:
        yield server


@asynccontextmanager
async def running(places: list[Place]) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as around:
        replicas = []
        for number, place in enumerate(places):
            replicas.append(Replica(f"store {number}", place))
            around.push_async_callback(replicas[-1].end)
            await replicas[-1].start()
        await replicas[0].process.register()
        yield replicas


async def ride_out(count: int, places: list[Place], servers: list[Server]) -> None:
    """A storm, and everything that must hold after it."""
    seed = int(os.environ.get("ADAPTERMESH_TESTS_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    async with running(places) as replicas:
        storm = Storm(StormConfig(count), replicas, servers, seed)
        feed_id = (await first_part(replicas[0])).feed_id
        watchers = [Watcher(replica, feed_id) for replica in replicas]
        await storm.run(watchers)
        told = Counter(upload.told.value for upload in storm.uploads)
        print(f"{count} uploads in {storm.attempts} attempts: {dict(told)}")
        print(f"kills: {dict(Counter(storm.kills))}; {storm.collected} blobs collected meanwhile")
        versions = await replicas[-1].process.versions()
        assert_only_what_may_be_visible(storm, versions)
        assert_numbered_without_gaps(versions)
        assert_watched_once(watchers, versions)
        needed = await assert_readable(storm, replicas, versions)
        await assert_nothing_leaked(places[0], replicas, needed)
        for place in places:
            assert list(place.staging.iterdir()) == []


def assert_only_what_may_be_visible(storm: Storm, versions: list[adapter_pb2.Version]) -> None:
    visible = versions_by_upload(storm.uploads, versions, digest_bytes)
    for upload in storm.uploads:
        version = visible.get(upload.seed)
        if upload.told is Told.ACKNOWLEDGED:
            assert upload.answer is not None
            assert version == upload.answer.version, upload
        else:
            assert version is None or upload.told is Told.LOST, upload
    repeated = [upload for upload in storm.uploads if upload.answer and not upload.answer.created]
    print(f"{len(repeated)} were acknowledged when they were repeated: the first answer was lost")
    lost = [upload for upload in storm.uploads if upload.told is Told.LOST]
    print(f"{sum(upload.seed in visible for upload in lost)} of {len(lost)} without an answer are visible")


def assert_numbered_without_gaps(versions: list[adapter_pb2.Version]) -> None:
    numbers: dict[str, list[int]] = {}
    for version in versions:
        numbers.setdefault(version.name, []).append(version.number)
    for name, found in numbers.items():
        assert sorted(found) == list(range(1, len(found) + 1)), name


def assert_watched_once(watchers: list[Watcher], versions: list[adapter_pb2.Version]) -> None:
    """Each checks by itself that no position is missing or comes twice."""
    for watcher in watchers:
        assert watcher.changes == watchers[0].changes
    published = [
        change.version_published
        for change in watchers[0].changes
        if change.WhichOneof("event") == "version_published"
    ]
    assert {version.digest for version in published} == {version.digest for version in versions}
    assert len(published) == len(versions)


async def assert_readable(
    storm: Storm, replicas: list[Replica], versions: list[adapter_pb2.Version]
) -> set[str]:
    """Every version is whole, at one store or the other in turn, and resolves at both; the blobs it needs."""
    uploads = {upload.seed: upload for upload in storm.uploads}
    needed: set[str] = set()
    for seed, version in versions_by_upload(storm.uploads, versions, digest_bytes).items():
        files = await asyncio.to_thread(uploads[seed].files)
        needed |= await assert_whole(replicas[seed % len(replicas)].process, version, files)
        ref = f"{version.namespace}/{version.name}:v{version.number}"
        for replica in replicas:
            answer = await retried(
                lambda ref=ref, replica=replica: replica.process.stub.ResolveRef(  # type: ignore[misc]
                    store_pb2.ResolveRefRequest(ref=ref)
                )
            )
            assert answer.version == version
            assert digest_bytes(answer.manifest) == version.digest
    return needed


async def assert_nothing_leaked(place: Place, replicas: list[Replica], needed: set[str]) -> None:
    await replicas[-1].process.collect()
    assert await asyncio.to_thread(place.blobs) == needed
    report = await replicas[0].process.collect()
    assert (report.removed_blobs, report.unfinished_uploads) == (0, 0)
    assert report.needed_blobs == len(needed)


async def ride_out_on_servers(
    count: int, folder: Path, postgres: PostgresServer, fragile_s3: S3Server
) -> None:
    prefix = "storm"
    places = [Place(folder / str(n), fragile_s3, prefix, postgres.url(DATABASE)) for n in range(2)]
    servers = [
        Server("postgresql", postgres.kill, postgres.start),
        Server("s3", fragile_s3.kill, fragile_s3.start),
    ]
    await ride_out(count, places, servers)


@pytest.mark.timeout(900)
async def test_kill_9_of_anything_at_random_points_of_uploads_to_two_stores_over_postgresql_and_s3(
    tmp_path: Path, postgres: PostgresServer, fragile_s3: S3Server
) -> None:
    await ride_out_on_servers(FEW, tmp_path, postgres, fragile_s3)


@pytest.mark.timeout(900)
async def test_kill_9_of_the_embedded_store_at_random_points_of_uploads(tmp_path: Path) -> None:
    await ride_out(FEW, [Place(tmp_path / "home")], [])


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_kill_9_of_anything_at_random_points_of_500_uploads_to_two_stores_over_postgresql_and_s3(
    tmp_path: Path, postgres: PostgresServer, fragile_s3: S3Server
) -> None:
    await ride_out_on_servers(MANY, tmp_path, postgres, fragile_s3)


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_kill_9_of_the_embedded_store_at_random_points_of_500_uploads(tmp_path: Path) -> None:
    await ride_out(MANY, [Place(tmp_path / "home")], [])
