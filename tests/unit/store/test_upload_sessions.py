"""Uploads in parts: over SQLite with a folder, and over PostgreSQL with a bucket."""

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.stores import StoreConfig
from adaptermesh.store.wire import header_from
from tests.unit.store.conftest import store_config
from tests.unit.store.upload_sender import (
    HOUR,
    WEIGHTS,
    FastClock,
    Sender,
    cuts,
    kept_parts,
    opened,
    read_back,
)


@pytest.fixture
def config(both_forms: StoreConfig) -> StoreConfig:
    return both_forms


async def test_parts_in_any_order_become_a_version_like_any_other_upload(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit, task="ner")
    shuffled = cuts(files)
    random.Random(1).shuffle(shuffled)
    await sender.parts(store, shuffled)
    done = await sender.complete(store)
    assert (done.created, done.version.number, done.version.task) == (True, 1, "ner")
    assert await read_back(store, done.version) == files
    same = await store.upload(files, task="ner")
    assert (same.created, same.version.digest) == (False, done.version.digest)
    assert await kept_parts(store.stores) == set()
    assert list((store.config.folder / "staging").iterdir()) == []


async def test_what_was_received_is_told_in_ranges(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit)
    assert not any((await sender.received(store)).values())
    await sender.parts(store, [(WEIGHTS, 100, 300), (WEIGHTS, 1000, 1500), (WEIGHTS, 300, 400)])
    assert await sender.received(store) == {
        "adapter_config.json": [],
        WEIGHTS: [(100, 300), (1000, 500)],
        "README.md": [],
    }


async def test_an_upload_goes_on_after_the_store_was_started_again(config: StoreConfig, kit: Any) -> None:
    files = kit.make_files(rank=8)
    wanted = cuts(files)
    async with kit.running_store(config) as first:
        await first.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        sender = await Sender(files).begin(first, kit)
        await sender.parts(first, wanted[:3])
        before = await sender.received(first)
    async with kit.running_store(config) as second:
        assert await sender.received(second) == before
        await sender.parts(second, wanted[3:])
        done = await sender.complete(second)
        assert await read_back(second, done.version) == files


async def test_completing_with_gaps_names_the_first_one(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit)
    missing = (WEIGHTS, 2500, 5000)
    await sender.parts(store, [cut for cut in cuts(files) if cut != missing])
    async with kit.refused() as errors:
        await sender.complete(store)
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.UPLOAD_INCOMPLETE)
    assert errors[0].metadata["file"] == WEIGHTS
    assert (errors[0].metadata["offset"], errors[0].metadata["size_bytes"]) == ("2500", "2500")
    await sender.part(store, missing)
    assert (await sender.complete(store)).created


async def test_completing_again_gives_the_same_answer(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, cuts(sender.files))
    first, second = await asyncio.gather(sender.complete(store), sender.complete(store))
    third = await sender.complete(store)
    assert first == second == third
    assert first.created
    found = await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id=sender.key))
    assert (found.completed, len(found.files)) == (True, 0)
    async with kit.refused() as errors:
        await sender.part(store, (WEIGHTS, 0, 100))
    assert errors[0].reason is Reason.UPLOAD_CONFLICT


async def test_a_version_whose_acknowledgement_a_crash_swallowed_is_found_again(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forget(*_: object) -> None:
        """The store died before it could keep the outcome."""

    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, cuts(sender.files))
    with monkeypatch.context() as patch:
        patch.setattr(store.stores.sessions, "_finish", forget)
        first = await sender.complete(store)
    again = await sender.complete(store)
    assert (first.created, again.created) == (True, False)
    assert again.version == first.version
    assert await kept_parts(store.stores) == set()


async def test_a_part_that_the_backend_has_lost_is_asked_for_again(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit)
    await sender.parts(store, cuts(files))
    path, start, end = lost = cuts(files)[2]
    await store.stores.parts._blobs.delete(digest_bytes(files[path][start:end]))
    async with kit.refused() as errors:
        await sender.complete(store)
    assert (errors[0].reason, errors[0].metadata["offset"]) == (Reason.UPLOAD_INCOMPLETE, str(start))
    await sender.parts(store, [lost])
    assert await read_back(store, (await sender.complete(store)).version) == files


async def test_a_refusal_ends_the_upload_and_is_remembered(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8, r=3)
    sender = await Sender(files).begin(store, kit)
    await sender.parts(store, cuts(files))
    messages = []
    for _ in range(2):
        async with kit.refused() as errors:
            await sender.complete(store)
        assert errors[0].reason is Reason.ADAPTER_REJECTED
        messages.append(errors[0].message)
    assert messages[0] == messages[1]
    assert await kept_parts(store.stores) == set()


async def test_what_the_header_shows_to_be_wrong_is_refused_at_the_beginning(store: Any, kit: Any) -> None:
    for fields, reason in (
        ({"base_model": "unknown"}, Reason.BASE_NOT_FOUND),
        ({"name": "NER"}, Reason.INVALID_NAME),
        ({"tags": ["x"] * 40}, Reason.INVALID_FIELD),
        ({"parents": [digest_bytes(b"x")]}, Reason.VERSION_NOT_FOUND),
        ({"validate_only": True}, Reason.INVALID_FIELD),
    ):
        async with kit.refused() as errors:
            await Sender(kit.make_files(rank=8)).begin(store, kit, **fields)
        assert errors[0].reason is reason


async def test_only_the_key_continues_an_upload_and_the_database_does_not_have_it(
    store: Any, kit: Any
) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    session = await store.stores.sessions.get(sender.key)
    for key in ("", "x" * 200, "guess", session.id):
        async with kit.refused() as errors:
            await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id=key))
        assert errors[0].reason in (Reason.UPLOAD_NOT_FOUND, Reason.INVALID_FIELD)
    assert sender.key not in repr(session)


async def test_an_abandoned_upload_leaves_nothing(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, cuts(sender.files)[:4])
    await sender.abandon(store)
    await sender.abandon(store)
    assert await kept_parts(store.stores) == set()
    async with kit.refused() as errors:
        await sender.complete(store)
    assert errors[0].reason is Reason.UPLOAD_NOT_FOUND


async def test_uploads_are_bounded_in_number_and_bytes(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    header = header_from(kit.make_header(kit.make_files(rank=8)))
    for limits in (SessionConfig(most=2), SessionConfig(most_bytes=2 * header.size_bytes)):
        stores = await opened(replace(config, sessions=limits), clock)
        try:
            keys = [(await stores.sessions.begin(header))[0] for _ in range(2)]
            with pytest.raises(MeshError) as caught:
                await stores.sessions.begin(header)
            assert (caught.value.code, caught.value.retry_after) == (Code.RESOURCE_EXHAUSTED, 60.0)
            await stores.sessions.abandon(keys[0])
            keys.append((await stores.sessions.begin(header))[0])
            clock.ahead += 25 * HOUR
            keys.append((await stores.sessions.begin(header))[0])
            await stores.sessions.abandon(keys[-1])
        finally:
            await stores.close()


async def test_an_upload_goes_on_at_any_of_several_stores(
    postgres_url: str, s3_server: Any, kit: Any, tmp_path: Path
) -> None:
    files = kit.make_files(rank=8)
    async with AsyncExitStack() as around:
        s3 = s3_server.config()
        stores = [
            await around.enter_async_context(
                kit.running_store(store_config(tmp_path / str(number), postgres_url, s3))
            )
            for number in range(2)
        ]
        base = store_pb2.RegisterBaseModelRequest(base_model=kit.base_model())
        await stores[0].stub.RegisterBaseModel(base)
        sender = await Sender(files).begin(stores[0], kit)
        for number, cut in enumerate(cuts(files)):
            await sender.part(stores[number % 2], cut)
        assert await sender.received(stores[0]) == await sender.received(stores[1])
        done = await asyncio.gather(*(sender.complete(store) for store in stores))
        assert sum(one.created for one in done) >= 1
        assert {one.version.number for one in done} == {1}
        assert await sender.complete(stores[0]) == await sender.complete(stores[1])
        assert await read_back(stores[1], done[0].version) == files
        assert await kept_parts(stores[0].stores) == set()
