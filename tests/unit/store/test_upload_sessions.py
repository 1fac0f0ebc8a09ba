"""Uploads in parts: over SQLite with a folder, and over PostgreSQL with a bucket."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.garbage import GarbageReport
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.part_intake import PartRequest
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.stores import StoreConfig, Stores
from adaptermesh.store.wire import header_from

HOUR = 3600.0
WEIGHTS = "adapter_model.safetensors"
PIECE = 1000

Files = Mapping[str, bytes]
Cut = tuple[str, int, int]
"""A file, and from where to where."""


class FastClock(SystemClock):
    """Goes ahead of the backend's clock."""

    ahead = 0.0

    def wall(self) -> float:
        return super().wall() + self.ahead


@dataclass
class Sender:
    """A client of one upload, at any store."""

    files: Files
    key: str = ""

    async def begin(self, store: Any, kit: Any, **fields: Any) -> "Sender":
        request = store_pb2.BeginUploadRequest(header=kit.make_header(self.files, **fields))
        begun = await store.stub.BeginUpload(request)
        assert begun.max_part_bytes == 8 * 2**20
        self.key = begun.upload_id
        return self

    async def part(
        self, store: Any, cut: Cut, data: bytes | None = None, **header: Any
    ) -> store_pb2.UploadPartResponse:
        path, start, end = cut
        content = self.files[path][start:end] if data is None else data
        values = {
            "upload_id": self.key,
            "path": path,
            "offset": start,
            "size_bytes": end - start,
            "digest": digest_bytes(content),
        }
        first = store_pb2.UploadPartRequest(header=store_pb2.PartHeader(**{**values, **header}))
        pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
        messages = [first, *(store_pb2.UploadPartRequest(data=piece) for piece in pieces)]

        async def paced() -> AsyncIterator[store_pb2.UploadPartRequest]:
            # A refusal must not cross a message: grpc.aio would lose it (grpc/grpc#36066).
            for message in messages:
                yield message
                await asyncio.sleep(0.02 if message is first else 0)

        done: store_pb2.UploadPartResponse = await store.stub.UploadPart(paced())
        return done

    async def parts(self, store: Any, cuts: Sequence[Cut]) -> None:
        for cut in cuts:
            assert (await self.part(store, cut)).created

    async def received(self, store: Any) -> dict[str, list[tuple[int, int]]]:
        found = await store.stub.GetUpload(store_pb2.GetUploadRequest(upload_id=self.key))
        return {file.path: [(r.offset, r.size_bytes) for r in file.ranges] for file in found.files}

    async def complete(self, store: Any) -> store_pb2.CompleteUploadResponse:
        request = store_pb2.CompleteUploadRequest(upload_id=self.key)
        done: store_pb2.CompleteUploadResponse = await store.stub.CompleteUpload(request)
        return done

    async def abandon(self, store: Any) -> None:
        await store.stub.AbandonUpload(store_pb2.AbandonUploadRequest(upload_id=self.key))


def cuts(files: Files, size: int = 2500) -> list[Cut]:
    """Every byte of every file, once."""
    return [
        (path, start, min(start + size, len(data)))
        for path, data in files.items()
        for start in range(0, len(data), size)
    ]


async def kept_parts(stores: Stores) -> set[str]:
    return {blob.digest async for blob in stores.parts._blobs.scan()}


async def read_back(store: Any, version: Any) -> dict[str, bytes]:
    found = {}
    for file in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=file.path)
        found[file.path] = b"".join([part.data async for part in store.stub.DownloadFile(request)])
    return found


@pytest.fixture(params=["sqlite-folder", "postgresql-s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    from tests.unit.store.conftest import store_config

    if request.param == "sqlite-folder":
        return store_config(tmp_path)
    url = request.getfixturevalue("postgres_url")
    return store_config(tmp_path, url, request.getfixturevalue("s3_server").config())


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


async def test_parts_that_two_uploads_share_stay_until_both_end(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    one = await Sender(files).begin(store, kit)
    two = await Sender(files).begin(store, kit, name="other")
    for sender in (one, two):
        await sender.parts(store, cuts(files))
    await one.abandon(store)
    assert (await two.complete(store)).version.name == "other"
    assert await kept_parts(store.stores) == set()


async def test_garbage_collection_leaves_the_parts_of_an_upload_in_progress(store: Any, kit: Any) -> None:
    files = kit.make_files(rank=8)
    sender = await Sender(files).begin(store, kit)
    wanted = cuts(files)
    await sender.parts(store, wanted[:4])
    source = store.config.folder / "lost"
    source.write_bytes(b"lost")
    await store.stores.parts.put(digest_bytes(b"lost"), source)
    kept = await kept_parts(store.stores)
    everything = store_pb2.CollectGarbageRequest(grace=Duration())
    looked = await store.stub.CollectGarbage(store_pb2.CollectGarbageRequest(dry_run=True, grace=Duration()))
    assert await kept_parts(store.stores) == kept
    done = await store.stub.CollectGarbage(everything)
    assert (done.removed_blobs, done.removed_bytes, done.needed_blobs) == (1, 4, 4)
    assert (looked.removed_blobs, looked.removed_bytes, looked.needed_blobs) == (1, 4, 4)
    await sender.parts(store, wanted[4:])
    assert (await sender.complete(store)).created


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


async def test_an_upload_to_which_nothing_comes_expires(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await _opened(config, clock, kit)
    try:
        key, _ = await stores.sessions.begin(header)
        clock.ahead = 23 * HOUR
        await _send(stores, key, files, WEIGHTS)
        clock.ahead = 46 * HOUR
        assert len((await stores.sessions.get(key)).parts) == 1
        clock.ahead = 48 * HOUR
        with pytest.raises(MeshError) as caught:
            await _send(stores, key, files, "README.md")
        assert caught.value.reason is Reason.UPLOAD_NOT_FOUND
        looked = await stores.garbage.collect(24 * HOUR, dry_run=True)
        assert (looked.expired_uploads, looked.removed_blobs) == (1, 1)
        done = await stores.garbage.collect(24 * HOUR)
        assert (done.expired_uploads, done.removed_blobs, done.young_blobs) == (1, 0, 0)
        assert await kept_parts(stores) == set()
        assert (await stores.garbage.collect(0)).expired_uploads == 0
    finally:
        await stores.close()


async def test_the_next_upload_clears_away_what_has_expired(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await _opened(config, clock, kit)
    try:
        key, _ = await stores.sessions.begin(header)
        await _send(stores, key, files, WEIGHTS)
        clock.ahead = 25 * HOUR
        await stores.sessions.begin(header)
        assert await kept_parts(stores) == set()
    finally:
        await stores.close()


async def test_uploads_are_bounded_in_number_and_bytes(config: StoreConfig, kit: Any) -> None:
    clock = FastClock()
    header = header_from(kit.make_header(kit.make_files(rank=8)))
    for limits in (SessionConfig(most=2), SessionConfig(most_bytes=2 * header.size_bytes)):
        stores = await _opened(replace(config, sessions=limits), clock, kit)
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


async def test_a_client_can_not_send_countless_tiny_parts(config: StoreConfig, kit: Any) -> None:
    files = kit.make_files(rank=8)
    header = header_from(kit.make_header(files))
    stores = await _opened(config, FastClock(), kit)
    try:
        key, _ = await stores.sessions.begin(header)
        with pytest.raises(MeshError, match="send larger ones"):
            for at in range(16 + 2 * len(files) + 1):
                await _send(stores, key, files, WEIGHTS, at, at + 1)
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


async def test_an_upload_goes_on_at_any_of_several_stores(
    postgres_url: str, s3_server: Any, kit: Any, tmp_path: Path
) -> None:
    from tests.unit.store.conftest import store_config

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


async def _opened(config: StoreConfig, clock: FastClock, kit: Any) -> Stores:
    from tests.contract.store.test_catalogue import BASE

    stores = Stores(config, clock)
    await stores.open()
    base = kit.base_model()
    values = {name: getattr(base, name) for name in BASE.__dataclass_fields__}
    await stores.catalogue.register_base_model(type(BASE)(**values))
    return stores


async def _send(
    stores: Stores, key: str, files: Files, path: str, start: int = 0, end: int | None = None
) -> None:
    data = files[path][start:end]

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    request = PartRequest(path, start, len(data), digest_bytes(data))
    await stores.sessions.receive(key, request, pieces())


def test_a_header_is_the_same_after_it_was_kept(kit: Any) -> None:
    from adaptermesh.store.session_rows import header_from_json, header_to_json

    header: UploadHeader = header_from(
        kit.make_header(
            kit.make_files(rank=8), tags=["a"], parents=[digest_bytes(b"x")], task="ner", author="é"
        )
    )
    assert header_from_json(header_to_json(header)) == header
