"""Removals that hang, and outlive what decided on them: no version counts on a blob that may vanish."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.store import removal_notes
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.schema import blob_removals
from adaptermesh.store.stores import StoreConfig, Stores
from adaptermesh.testing.polling import eventually
from tests.postgres import PostgresServer, running_postgres

HOUR = 3600.0
CONFIG = "adapter_config.json"


class HungRemovals:
    """Stands before a store's blobs: a removal is carried out only when it is let go on."""

    def __init__(self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        self._delete = stores.blobs.delete
        self.sent = asyncio.Event()
        self.go_on = asyncio.Event()
        monkeypatch.setattr(stores.blobs, "delete", self.delete)

    async def delete(self, digest: str) -> None:
        self.sent.set()
        await self.go_on.wait()
        await self._delete(digest)


async def put(stores: Stores, folder: Path, content: bytes) -> str:
    digest, source = digest_bytes(content), folder / "source"
    await asyncio.to_thread(source.write_bytes, content)
    await stores.blobs.put(digest, source)
    return digest


async def notes(stores: Stores) -> set[str]:
    async with stores.database.reading() as connection:
        return set((await connection.execute(select(blob_removals.c.digest))).scalars())


async def assert_whole(store: Any, version: Any, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=path)
        assert b"".join([part.data async for part in store.stub.DownloadFile(request)]) == content
    fetch = store_pb2.FetchAdapterRequest(digest=version.digest)
    assert sum([len(part.data) async for part in store.stub.FetchAdapter(fetch)]) == version.size_bytes


@pytest.fixture
async def store(either: Any, kit: Any) -> AsyncIterator[Any]:
    impatient = replace(either, uploads=replace(either.uploads, removal_seconds=0.3))
    async with kit.running_store(impatient) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        yield running


@pytest.fixture
def fragile_postgres() -> Any:
    with running_postgres(durable=True) as server:
        server.sql("CREATE DATABASE mesh")
        yield server


async def test_a_removal_that_hangs_over_a_restart_of_postgresql_takes_no_blob_from_a_version(
    fragile_postgres: PostgresServer,
    s3_server: Any,
    kit: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    database, s3 = DatabaseConfig(fragile_postgres.url("mesh")), s3_server.config()
    first_config = StoreConfig(tmp_path / "first", database, s3)
    second_config = StoreConfig(tmp_path / "second", database, s3)
    async with kit.running_store(first_config) as first, kit.running_store(second_config) as second:
        await first.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        files = kit.make_files()
        await put(first.stores, tmp_path, files[CONFIG])
        hung = HungRemovals(first.stores, monkeypatch)
        collecting = asyncio.create_task(first.stores.garbage.collect(-HOUR))
        await hung.sent.wait()
        fragile_postgres.kill()
        fragile_postgres.start()
        uploading = asyncio.create_task(upload_again(second, files))

        async def looked() -> bool:
            return uploading.done() or "blobs are being removed" in caplog.messages

        await eventually(looked)
        hung.go_on.set()
        await asyncio.gather(collecting, return_exceptions=True)
        version = (await uploading).version
        await assert_whole(second, version, files)
        assert await notes(second.stores) == set()


async def upload_again(store: Any, files: dict[str, bytes]) -> Any:
    """A connection to a database that was restarted is found out by being used."""

    async def attempt() -> Any:
        async with asyncio.timeout(30):
            try:
                return await store.upload(files)
            except Exception as error:
                if "database" not in str(error):
                    raise
                return None

    return await eventually(attempt, within=60)


async def test_an_upload_waits_for_a_removal_and_puts_the_blob_again(
    store: Any, kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = kit.make_files()
    digest = await put(store.stores, tmp_path, files[CONFIG])
    hung = HungRemovals(store.stores, monkeypatch)
    collecting = asyncio.create_task(store.stores.garbage.collect(-HOUR))
    await hung.sent.wait()
    assert await notes(store.stores) == {digest}
    # Others write meanwhile.
    await store.upload(kit.make_files(2, r=2), name="other", validate_only=True)
    async with kit.refused() as errors:
        await store.upload(files)
    assert (errors[0].code, errors[0].reason) == (Code.UNAVAILABLE, Reason.OVERLOADED)
    assert 0 < errors[0].retry_after <= removal_notes.NOTE_SECONDS
    assert "blobs are being removed" in caplog.messages
    hung.go_on.set()
    assert (await collecting).removed_blobs >= 1
    version = (await store.upload(files)).version
    await assert_whole(store, version, files)
    assert await notes(store.stores) == set()


async def test_a_removal_that_was_not_answered_stays_noted_until_it_expires(
    store: Any, kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = kit.make_files()
    digests = sorted(
        [await put(store.stores, tmp_path, files[CONFIG]), await put(store.stores, tmp_path, b"x")]
    )

    async def lost(digest: str) -> None:
        raise unavailable(Reason.STORE_UNREACHABLE, f"no answer for {digest}", 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(store.stores.blobs, "delete", lost)
        with pytest.raises(MeshError, match="no answer"):
            await store.stores.garbage.collect(-HOUR)
    # The second one was never sent.
    (noted,) = await notes(store.stores)
    assert noted in digests
    # Both go at the next time; but the first one's earlier removal may still come.
    assert (await store.stores.garbage.collect(-HOUR)).removed_blobs == 2
    assert await notes(store.stores) == {noted}
    expire = update(blob_removals).values(expire_time_us=1)
    await store.stores.database.write(lambda connection: connection.execute(expire))
    version = (await store.upload(files)).version
    await assert_whole(store, version, files)
    # Notes that have expired go with the next ones.
    await put(store.stores, tmp_path, b"y")
    await store.stores.garbage.collect(-HOUR)
    assert await notes(store.stores) == set()


async def test_a_collection_whose_caller_goes_away_comes_to_the_end_of_what_it_sent(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await put(store.stores, tmp_path, b"lost")
    hung = HungRemovals(store.stores, monkeypatch)
    collecting = asyncio.create_task(store.stores.garbage.collect(-HOUR))
    await hung.sent.wait()
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    hung.go_on.set()
    await store.stores.garbage.close()
    assert await store.stores.blobs.stat(digest) is None
    assert await notes(store.stores) == set()


async def test_a_store_with_a_folder_of_its_own_forgets_the_removals_of_its_predecessor(
    kit: Any, config: Any
) -> None:
    async with kit.running_store(config) as store:
        await store.stores.database.write(
            lambda connection: removal_notes.note(connection, [digest_bytes(b"x")], "gone")
        )
    async with kit.running_store(config) as store:
        assert await notes(store.stores) == set()


async def test_each_who_sends_a_removal_has_a_note_of_his_own(store: Any) -> None:
    first, second = [digest_bytes(content) for content in (b"1", b"2")]
    write = store.stores.database.write
    await write(lambda connection: removal_notes.note(connection, [first], "one"))
    await write(lambda connection: removal_notes.note(connection, [first, second], "other"))
    await write(lambda connection: removal_notes.forget(connection, [first, second], "one"))
    assert await notes(store.stores) == {first, second}
    await write(lambda connection: removal_notes.forget(connection, [first], "other"))
    assert await notes(store.stores) == {second}


async def test_notes_hold_for_minutes(store: Any) -> None:
    first, second = [digest_bytes(content) for content in (b"1", b"2")]
    await store.stores.database.write(lambda connection: removal_notes.note(connection, [first], "me"))
    async with store.stores.database.reading() as connection:
        left = await removal_notes.seconds_left(connection, [first, second])
        assert left is not None
        assert removal_notes.NOTE_SECONDS - 60 < left <= removal_notes.NOTE_SECONDS
        assert await removal_notes.seconds_left(connection, [second]) is None
        assert await removal_notes.seconds_left(connection, []) is None
