"""What may be sent as a part, and what a store makes of it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.garbage import GarbageReport
from adaptermesh.store.part_intake import PartRequest
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.stores import StoreConfig
from adaptermesh.store.wire import header_from
from tests.unit.store.upload_sender import (
    HOUR,
    WEIGHTS,
    Cut,
    FastClock,
    Sender,
    cuts,
    kept_parts,
    opened,
    send,
)


@pytest.fixture
def config(both_forms: StoreConfig) -> StoreConfig:
    return both_forms


async def test_the_same_part_again_changes_nothing(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    cut = (WEIGHTS, 0, 2000)
    assert (await sender.part(store, cut)).created
    assert not (await sender.part(store, cut)).created
    assert (await sender.received(store))[WEIGHTS] == [(0, 2000)]


@pytest.mark.parametrize("cut", [(WEIGHTS, 0, 500), (WEIGHTS, 900, 1500), (WEIGHTS, 50, 2500)])
async def test_a_part_that_overlaps_another_one_is_refused(store: Any, kit: Any, cut: Cut) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, [(WEIGHTS, 100, 1000)])
    async with kit.refused() as errors:
        await sender.part(store, cut)
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.UPLOAD_CONFLICT)
    assert (errors[0].metadata["offset"], errors[0].metadata["size_bytes"]) == ("100", "900")


async def test_the_same_range_with_other_bytes_is_refused(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, [(WEIGHTS, 0, 100)])
    async with kit.refused() as errors:
        await sender.part(store, (WEIGHTS, 0, 100), bytes(100))
    assert errors[0].reason is Reason.UPLOAD_CONFLICT
    assert "with other content" in errors[0].message


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"offset": 10**9}, "are not inside file"),
        ({"offset": -1}, "are not inside file"),
        ({"size_bytes": 0}, "a part has 1 to"),
        ({"size_bytes": 2**24}, "a part has 1 to"),
        ({"path": "other.json"}, "has no file"),
        ({"digest": "sha256:0"}, "has no sha256 digest"),
        ({"size_bytes": 20}, "beyond the 20 bytes"),
        ({"size_bytes": 2000}, "ends after 100 of 2000 bytes"),
    ],
)
async def test_a_part_that_can_not_be_is_refused(
    store: Any, kit: Any, header: dict[str, Any], words: str
) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    async with kit.refused() as errors:
        await sender.part(store, (WEIGHTS, 0, 100), **header)
    assert (errors[0].code, errors[0].reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD)
    assert words in errors[0].message
    assert (await sender.received(store))[WEIGHTS] == []
    assert await kept_parts(store.stores) == set()


async def test_a_part_with_other_bytes_than_its_digest_says_is_refused(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    async with kit.refused() as errors:
        await sender.part(store, (WEIGHTS, 0, 100), digest=digest_bytes(b"other"))
    assert errors[0].reason is Reason.DIGEST_MISMATCH
    assert await kept_parts(store.stores) == set()


async def test_a_part_that_is_collected_before_it_is_needed_is_put_again(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = store.stores.parts
    put, reports = parts.put, list[GarbageReport]()

    async def put_and_collect(digest: str, source: Path) -> None:
        await put(digest, source)
        if not reports:
            reports.append(await store.stores.garbage.collect(-HOUR))

    monkeypatch.setattr(parts, "put", put_and_collect)
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    await sender.parts(store, cuts(sender.files))
    assert reports[0].removed_blobs == 1
    assert (await sender.complete(store)).created


async def test_a_client_can_not_send_countless_tiny_parts(config: StoreConfig, kit: Any) -> None:
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await opened(config, FastClock())
    try:
        key, _ = await stores.sessions.begin(header)
        with pytest.raises(MeshError, match="send larger ones"):
            for at in range(16 + 2 * len(files) + 1):
                await send(stores, key, files, WEIGHTS, at, at + 1)
    finally:
        await stores.close()


async def test_a_store_that_shuts_down_takes_no_parts(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    store.stores.drain()
    for call in (sender.part(store, (WEIGHTS, 0, 100)), Sender(kit.make_files(rank=8)).begin(store, kit)):
        async with kit.refused() as errors:
            await call
        assert (errors[0].code, errors[0].reason) == (Code.UNAVAILABLE, Reason.DRAINING)


async def test_a_client_that_leaves_in_the_middle_of_a_part_leaves_nothing(store: Any, kit: Any) -> None:
    sender = await Sender(kit.make_files(rank=8)).begin(store, kit)
    header = store_pb2.PartHeader(
        upload_id=sender.key, path=WEIGHTS, offset=0, size_bytes=2000, digest=digest_bytes(b"")
    )

    async def half() -> AsyncIterator[store_pb2.UploadPartRequest]:
        yield store_pb2.UploadPartRequest(header=header)
        yield store_pb2.UploadPartRequest(data=bytes(1000))
        await asyncio.Event().wait()

    call = store.stub.UploadPart(half())
    staging = store.config.folder / "staging"
    await kit.until(lambda: [path for path in staging.rglob("*") if path.is_file()])
    call.cancel()
    await kit.until(lambda: not list(staging.iterdir()))
    assert (await sender.received(store))[WEIGHTS] == []


async def test_a_part_that_trickles_in_does_not_keep_its_turn(both_forms: StoreConfig, kit: Any) -> None:
    config = replace(both_forms, sessions=SessionConfig(part_seconds=0.05, parts_at_once=1))
    stores = await opened(config, SystemClock())

    async def trickle() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    try:
        files = kit.make_files(rank=8)
        key, _ = await stores.sessions.begin(header_from(kit.make_header(files)))
        for _ in range(2):
            request = PartRequest(WEIGHTS, 0, 1000, digest_bytes(b""))
            with pytest.raises(MeshError) as caught:
                await stores.sessions.receive(key, request, trickle())
            assert caught.value.code is Code.DEADLINE_EXCEEDED
        assert list((config.folder / "staging").iterdir()) == []
    finally:
        await stores.close()


async def test_parts_wait_for_their_turn_and_are_refused_when_too_many_wait(
    both_forms: StoreConfig, kit: Any
) -> None:
    config = replace(both_forms, sessions=SessionConfig(parts_at_once=1))
    stores = await opened(config, SystemClock())
    go_on = asyncio.Event()
    data = kit.make_files(rank=8)[WEIGHTS]

    async def held(start: int) -> AsyncIterator[bytes]:
        await go_on.wait()
        yield data[start : start + 10]

    async def part(key: str, start: int) -> Any:
        request = PartRequest(WEIGHTS, start, 10, digest_bytes(data[start : start + 10]))
        return await stores.sessions.receive(key, request, held(start))

    try:
        key, _ = await stores.sessions.begin(header_from(kit.make_header(kit.make_files(rank=8))))
        sending = [asyncio.create_task(part(key, 10 * number)) for number in range(18)]
        await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = [task for task in sending if task.done()]
        error = refused.exception()
        assert isinstance(error, MeshError)
        assert (error.code, error.retry_after) == (Code.RESOURCE_EXHAUSTED, 1.0)
        go_on.set()
        done = await asyncio.gather(*(task for task in sending if task is not refused))
        assert all(one.created for one in done)
    finally:
        await stores.close()
