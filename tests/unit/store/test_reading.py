from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason
from adaptermesh.store import reading


async def fetch(store: Any, digest: str, offset: int = 0) -> tuple[bytes, list[bytes]]:
    request = store_pb2.FetchAdapterRequest(digest=digest, offset=offset)
    messages = [message async for message in store.stub.FetchAdapter(request)]
    assert [message.WhichOneof("part") for message in messages] == ["manifest"] + ["data"] * (
        len(messages) - 1
    )
    return messages[0].manifest, [message.data for message in messages[1:]]


@pytest.fixture
async def version(store: Any, kit: Any) -> Any:
    # Wide enough for layers of more than one chunk.
    return (await store.upload(kit.make_files(rank=32, seed=3))).version


async def test_a_fetch_from_any_offset_gives_the_same_bytes(store: Any, version: Any) -> None:
    manifest, pieces = await fetch(store, version.digest)
    whole = b"".join(pieces)
    chunks = Manifest.from_bytes(manifest).chunks
    offsets = {0, 1, 7, version.size_bytes - 1, version.size_bytes}
    for chunk in chunks:
        offsets |= {chunk.offset, max(chunk.offset - 1, 0), chunk.offset + 1}
    for offset in sorted(offsets):
        again, rest = await fetch(store, version.digest, offset)
        assert again == manifest
        assert b"".join(rest) == whole[offset:]


async def test_a_message_is_as_many_whole_chunks_as_fit(
    store: Any, version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 8192
    monkeypatch.setattr(reading, "MAX_PIECE_BYTES", most)
    manifest, _ = await fetch(store, version.digest)
    chunks = Manifest.from_bytes(manifest).chunks
    ends = [chunk.offset + chunk.size for chunk in chunks]
    assert max(chunk.size for chunk in chunks) <= most < version.size_bytes
    for offset in (0, 5, chunks[1].offset + 3):
        _, pieces = await fetch(store, version.digest, offset)
        start = offset
        for piece in pieces:
            end = start + len(piece)
            assert len(piece) <= most
            assert end in ends
            assert all(later - start > most for later in ends if later > end)
            start = end
        assert start == version.size_bytes


async def test_a_fetch_from_the_end_gives_the_manifest_alone(store: Any, version: Any) -> None:
    manifest, pieces = await fetch(store, version.digest, version.size_bytes)
    assert digest_bytes(manifest) == version.digest
    assert pieces == []


async def test_an_offset_past_the_end_is_out_of_range(store: Any, version: Any, kit: Any) -> None:
    path = version.source_files[0].path
    for call in (
        store.stub.FetchAdapter(
            store_pb2.FetchAdapterRequest(digest=version.digest, offset=version.size_bytes + 1)
        ),
        store.stub.DownloadFile(
            store_pb2.DownloadFileRequest(digest=version.digest, path=path, offset=10**9)
        ),
    ):
        async with kit.refused() as errors:
            await call.read()
            await call.read()
        assert errors[0].code is Code.OUT_OF_RANGE
        assert errors[0].metadata["field"] == "offset"


async def test_a_negative_offset_is_refused(store: Any, version: Any, kit: Any) -> None:
    async with kit.refused() as errors:
        await fetch(store, version.digest, -1)
    assert errors[0].code is Code.INVALID_ARGUMENT


async def test_an_unknown_digest_or_file_is_not_found(store: Any, version: Any, kit: Any) -> None:
    unknown = digest_bytes(b"unknown")
    async with kit.refused() as errors:
        await fetch(store, unknown)
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
    assert errors[0].metadata["name"] == unknown
    async with kit.refused() as errors:
        await fetch(store, "v3")
    assert errors[0].code is Code.INVALID_ARGUMENT
    async with kit.refused() as errors:
        await store.stub.DownloadFile(
            store_pb2.DownloadFileRequest(digest=version.digest, path="../catalogue.db")
        ).read()
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.FILE_NOT_FOUND)


async def test_a_download_from_any_offset_gives_the_uploaded_bytes(store: Any, kit: Any) -> None:
    files = kit.make_files()
    files["notes.txt"] = bytes(range(48, 122)) * 12_000
    files["LICENSE"] = b""
    version = (await store.upload(files)).version
    for path, data in files.items():
        for offset in {0, 1, len(data) // 2, len(data)} - {1 if not data else -1}:
            request = store_pb2.DownloadFileRequest(digest=version.digest, path=path, offset=offset)
            parts = [part.data async for part in store.stub.DownloadFile(request)]
            assert b"".join(parts) == data[offset:]
            assert all(0 < len(part) <= 2**20 for part in parts)


async def test_a_reader_that_stops_reading_slows_only_itself(store: Any, kit: Any) -> None:
    files = kit.make_files()
    files["vocab.txt"] = b"0123456789abcdef" * 2**20
    version = (await store.upload(files, piece=2**19)).version
    request = store_pb2.DownloadFileRequest(digest=version.digest, path="vocab.txt")
    stuck = store.stub.DownloadFile(request)
    assert len((await stuck.read()).data) > 0
    for _ in range(3):
        parts = [part.data async for part in store.stub.DownloadFile(request)]
        assert b"".join(parts) == files["vocab.txt"]
    stuck.cancel()


async def test_a_reader_that_goes_away_leaves_no_open_file(store: Any, kit: Any) -> None:
    files = kit.make_files()
    files["vocab.txt"] = b"0123456789abcdef" * 2**20
    version = (await store.upload(files, piece=2**19)).version
    blobs = str(store.config.folder / "blobs")

    def open_blobs() -> int:
        count = 0
        for handle in Path("/proc/self/fd").iterdir():
            # The listing's own handle is gone by now.
            with suppress(FileNotFoundError):
                count += str(handle.readlink()).startswith(blobs)
        return count

    request = store_pb2.DownloadFileRequest(digest=version.digest, path="vocab.txt")
    calls = [store.stub.DownloadFile(request) for _ in range(4)]
    for call in calls:
        await call.read()
    assert open_blobs() == 4
    for call in calls:
        call.cancel()
    await kit.until(lambda: open_blobs() == 0)


async def test_a_resolved_ref_comes_with_its_manifest_and_every_alias(
    store: Any, version: Any, kit: Any
) -> None:
    await store.upload(kit.make_files(seed=9))
    for alias, number in (("prod", 1), ("latest", 1), ("canary", 2), ("moved", 1), ("moved", 2)):
        await store.stub.SetAlias(
            store_pb2.SetAliasRequest(namespace="acme", name="ner", alias=alias, version_number=number)
        )
    for ref in ("acme/ner:v1", "acme/ner@prod", "acme/ner", f"acme/ner@{version.digest}"):
        answer = await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref=ref))
        assert answer.version == version
        assert list(answer.aliases) == ["latest", "prod"]
        assert digest_bytes(answer.manifest) == version.digest


@pytest.mark.parametrize(
    ("ref", "code", "reason"),
    [
        ("acme/other:v1", Code.NOT_FOUND, Reason.ADAPTER_NOT_FOUND),
        ("acme/ner:v9", Code.NOT_FOUND, Reason.VERSION_NOT_FOUND),
        ("acme/ner@prod", Code.NOT_FOUND, Reason.ALIAS_NOT_FOUND),
        ("acme/ner@sha256:" + "0" * 64, Code.NOT_FOUND, Reason.VERSION_NOT_FOUND),
        ("ner", Code.INVALID_ARGUMENT, Reason.INVALID_REF),
        ("base", Code.INVALID_ARGUMENT, Reason.INVALID_REF),
    ],
)
async def test_a_ref_that_means_nothing_says_why(
    store: Any, version: Any, kit: Any, ref: str, code: Code, reason: Reason
) -> None:
    async with kit.refused() as errors:
        await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref=ref))
    assert (errors[0].code, errors[0].reason) == (code, reason)


async def test_a_damaged_blob_is_an_error_and_never_wrong_bytes(store: Any, version: Any, kit: Any) -> None:
    stored = await store.stores.catalogue.get_digest(version.digest)
    digits = stored.tensor_digest.removeprefix("sha256:")
    blob = store.config.folder / "blobs" / "sha256" / digits[:2] / digits[2:]
    blob.write_bytes(blob.read_bytes()[:-1])
    async with kit.refused() as errors:
        await fetch(store, version.digest)
    assert (errors[0].code, errors[0].reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
    digits = version.digest.removeprefix("sha256:")
    manifest = store.config.folder / "blobs" / "sha256" / digits[:2] / digits[2:]
    manifest.write_bytes(manifest.read_bytes() + b" ")
    async with kit.refused() as errors:
        await fetch(store, version.digest)
    assert errors[0].reason is Reason.DATA_CORRUPT
