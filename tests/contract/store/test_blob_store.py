import asyncio
import time
from pathlib import Path

import pytest

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.blob_reading import HeadedRange
from adaptermesh.store.blobs import BlobStore

CONTENT = bytes(range(256)) * 10_000
DIGEST = digest_bytes(CONTENT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


async def whole(blobs: BlobStore, digest: str) -> bytes:
    async with blobs.open(digest) as reader:
        return await reader.read(0, reader.size)


async def test_what_is_put_can_be_read_back_and_its_source_stays(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    assert await whole(blobs, DIGEST) == CONTENT
    assert await asyncio.to_thread(source.read_bytes) == CONTENT


async def test_an_empty_blob_is_a_blob(blobs: BlobStore, source: Path) -> None:
    await asyncio.to_thread(source.write_bytes, b"")
    await blobs.put(digest_bytes(b""), source)
    assert await whole(blobs, digest_bytes(b"")) == b""


async def test_every_range_is_read_exactly(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    async with blobs.open(DIGEST) as reader:
        assert reader.size == len(CONTENT)
        for offset, size in ((0, 1), (1, 255), (1_000_001, 70_000), (len(CONTENT) - 1, 1), (5, 0)):
            assert await reader.read(offset, size) == CONTENT[offset : offset + size]
        pieces = await asyncio.gather(*(reader.read(start, 1000) for start in range(0, 100_000, 1000)))
        assert b"".join(pieces) == CONTENT[:100_000]


async def test_ranges_come_behind_their_heads(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    ranges = [HeadedRange(10, 5, b"a"), HeadedRange(15, 0, b"none"), HeadedRange(15, 70_000)]
    async with blobs.open(DIGEST) as reader:
        found = await reader.read_behind(ranges)
    assert found == [b"a" + CONTENT[10:15], b"none", CONTENT[15:70_015]]
    assert {type(each) for each in found} == {bytes}


async def test_a_small_blob_is_got_as_a_whole_and_a_larger_one_is_not(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    assert await blobs.get(DIGEST, len(CONTENT)) == CONTENT
    for digest, most in ((DIGEST, len(CONTENT) - 1), (digest_bytes(b"not there"), 10)):
        with pytest.raises(MeshError) as caught:
            await blobs.get(digest, most)
        assert caught.value.reason is Reason.DATA_CORRUPT


async def test_an_empty_blob_is_got(blobs: BlobStore, source: Path) -> None:
    await asyncio.to_thread(source.write_bytes, b"")
    await blobs.put(digest_bytes(b""), source)
    assert await blobs.get(digest_bytes(b""), 0) == b""


async def test_a_range_past_the_end_is_an_error(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    async with blobs.open(DIGEST) as reader:
        with pytest.raises(MeshError) as caught:
            await reader.read(len(CONTENT) - 10, 11)
    assert caught.value.reason is Reason.DATA_CORRUPT


async def test_a_blob_that_is_not_there_is_an_error(blobs: BlobStore) -> None:
    with pytest.raises(MeshError) as caught:
        await whole(blobs, DIGEST)
    assert caught.value.reason is Reason.DATA_CORRUPT


async def test_content_with_another_digest_is_not_kept(blobs: BlobStore, source: Path) -> None:
    wrong = digest_bytes(b"something else")
    with pytest.raises(MeshError) as caught:
        await blobs.put(wrong, source)
    assert caught.value.reason is Reason.DATA_CORRUPT
    with pytest.raises(MeshError):
        await whole(blobs, wrong)


async def test_the_same_blob_may_be_put_many_times_at_once(blobs: BlobStore, source: Path) -> None:
    await asyncio.gather(*(blobs.put(DIGEST, source) for _ in range(8)))
    assert await whole(blobs, DIGEST) == CONTENT


async def test_a_deleted_blob_is_gone_and_may_be_deleted_again(blobs: BlobStore, source: Path) -> None:
    await blobs.put(DIGEST, source)
    await blobs.delete(DIGEST)
    await blobs.delete(DIGEST)
    with pytest.raises(MeshError):
        await whole(blobs, DIGEST)
    await blobs.put(DIGEST, source)
    assert await whole(blobs, DIGEST) == CONTENT


async def test_a_reader_whose_blob_is_deleted_gets_the_right_bytes_or_an_error(
    blobs: BlobStore, source: Path
) -> None:
    await blobs.put(DIGEST, source)
    async with blobs.open(DIGEST) as reader:
        await blobs.delete(DIGEST)
        try:
            assert await reader.read(10, 100) == CONTENT[10:110]
        except MeshError as error:
            assert error.reason is Reason.DATA_CORRUPT


async def test_what_is_there_is_listed_with_its_size_and_the_time_it_was_put(
    blobs: BlobStore, source: Path
) -> None:
    assert [blob async for blob in blobs.scan()] == []
    assert await blobs.stat(DIGEST) is None
    before = time.time()
    contents = {digest_bytes(bytes([value]) * value): bytes([value]) * value for value in range(5)}
    for digest, content in contents.items():
        await asyncio.to_thread(source.write_bytes, content)
        await blobs.put(digest, source)
    found = {blob.digest: blob async for blob in blobs.scan()}
    assert {digest: blob.size_bytes for digest, blob in found.items()} == {
        digest: len(content) for digest, content in contents.items()
    }
    # Some backends count in seconds.
    assert all(before - 2 < blob.modify_time < time.time() + 2 for blob in found.values())
    for digest, blob in found.items():
        assert await blobs.stat(digest) == blob


async def test_a_blob_that_was_put_leaves_nothing_unfinished(blobs: BlobStore, source: Path) -> None:
    large = CONTENT * 5
    await asyncio.to_thread(source.write_bytes, large)
    await blobs.put(digest_bytes(large), source)
    with pytest.raises(MeshError):
        await blobs.put(DIGEST, source)
    assert await whole(blobs, digest_bytes(large)) == large
    assert await blobs.unfinished(time.time() + 10) == 0
    assert await blobs.discard_unfinished(time.time() + 10) == 0


async def test_a_put_whose_caller_goes_away_leaves_all_or_nothing(blobs: BlobStore, source: Path) -> None:
    large = CONTENT * 5
    await asyncio.to_thread(source.write_bytes, large)
    putting = asyncio.create_task(blobs.put(digest_bytes(large), source))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    await blobs.put(digest_bytes(large), source)
    assert await whole(blobs, digest_bytes(large)) == large


@pytest.mark.parametrize("digest", ["", "sha256:", "../../etc/passwd", DIGEST.upper(), DIGEST + "/x"])
async def test_only_a_digest_names_a_blob(blobs: BlobStore, source: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        await blobs.put(digest, source)
