import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.store.blobs import FolderBlobStore
from adaptermesh.store.manifests import Manifests

FIRST, SECOND, THIRD = (bytes([number]) * 100 for number in range(3))


@pytest.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[FolderBlobStore]:
    store = FolderBlobStore(tmp_path / "blobs")
    await store.recover()
    for content in (FIRST, SECOND, THIRD):
        source = tmp_path / "source"
        await asyncio.to_thread(source.write_bytes, content)
        await store.put(digest_bytes(content), source)
    yield store
    await store.close()


async def test_a_manifest_that_was_read_is_given_again_without_its_blob(blobs: FolderBlobStore) -> None:
    manifests, digest = Manifests(blobs), digest_bytes(FIRST)
    assert await manifests.read(digest) == FIRST
    await blobs.delete(digest)
    assert await manifests.read(digest) == FIRST


async def test_what_was_asked_for_longest_ago_makes_room_and_the_bytes_stay_within_their_bound(
    blobs: FolderBlobStore,
) -> None:
    manifests = Manifests(blobs, most_bytes=250)
    for content in (FIRST, SECOND, FIRST, THIRD):
        assert await manifests.read(digest_bytes(content)) == content
        assert manifests.kept_bytes <= 250
    for content in (FIRST, SECOND, THIRD):
        await blobs.delete(digest_bytes(content))
    assert await manifests.read(digest_bytes(FIRST)) == FIRST
    with pytest.raises(MeshError):
        await manifests.read(digest_bytes(SECOND))


async def test_one_that_is_larger_than_all_the_room_is_read_and_not_kept(blobs: FolderBlobStore) -> None:
    manifests = Manifests(blobs, most_bytes=50)
    assert await manifests.read(digest_bytes(FIRST)) == FIRST
    assert manifests.kept_bytes == 0


async def test_many_readers_of_one_manifest_keep_it_once(blobs: FolderBlobStore) -> None:
    manifests, digest = Manifests(blobs), digest_bytes(FIRST)
    assert set(await asyncio.gather(*(manifests.read(digest) for _ in range(20)))) == {FIRST}
    assert manifests.kept_bytes == len(FIRST)


async def test_a_damaged_manifest_is_refused_and_not_kept(blobs: FolderBlobStore, tmp_path: Path) -> None:
    manifests, digest = Manifests(blobs), digest_bytes(FIRST)
    (file,) = (path for path in (tmp_path / "blobs").rglob("*") if path.name == digest[9:])
    await asyncio.to_thread(file.write_bytes, SECOND)
    with pytest.raises(MeshError) as caught:
        await manifests.read(digest)
    assert caught.value.reason is Reason.DATA_CORRUPT
    assert manifests.kept_bytes == 0
    await asyncio.to_thread(file.write_bytes, FIRST)
    assert await manifests.read(digest) == FIRST
