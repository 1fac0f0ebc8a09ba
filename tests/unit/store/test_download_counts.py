"""Downloads are counted: once each, from the beginning, in batches, by several stores."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason, unavailable
from adaptermesh.store.records import SourceFile
from tests.contract.store.test_catalogue import VERSION

WEIGHTS = "adapter_model.safetensors"


async def download(store: Any, version: Any, path: str, offset: int = 0) -> None:
    request = store_pb2.DownloadFileRequest(digest=version.digest, path=path, offset=offset)
    async for _ in store.stub.DownloadFile(request):
        pass


async def fetch(store: Any, version: Any, offset: int = 0) -> None:
    request = store_pb2.FetchAdapterRequest(digest=version.digest, offset=offset)
    async for _ in store.stub.FetchAdapter(request):
        pass


async def counts(store: Any, versions: Sequence[Any]) -> list[int]:
    digests = [version.digest for version in versions]
    request = store_pb2.GetDownloadCountsRequest(digests=digests)
    return list((await store.stub.GetDownloadCounts(request)).counts)


async def test_a_download_counts_once_however_many_files_it_has(store: Any, publish: Any) -> None:
    first, second = await publish(seeds=(1, 2))
    for path in ("README.md", "adapter_config.json", WEIGHTS):
        await download(store, first, path)
    await download(store, first, WEIGHTS, offset=1000)
    await fetch(store, second)
    await fetch(store, second)
    await fetch(store, second, offset=1)
    assert await counts(store, [first, second]) == [0, 0], "nothing is written for a download by itself"
    await store.stores.download_counts.flush()
    assert await counts(store, [second, first]) == [2, 1]
    await fetch(store, first)
    await store.stores.download_counts.flush()
    assert await counts(store, [first, second]) == [2, 2]
    listed = await store.stub.ListAdapters(store_pb2.ListAdaptersRequest())
    assert [summary.download_count for summary in listed.adapters] == [4]


async def test_counts_are_no_changes_of_the_feed(store: Any, publish: Any) -> None:
    (version,) = await publish()
    before = await store.stub.GetFeedStatus(store_pb2.GetFeedStatusRequest())
    await fetch(store, version)
    await store.stores.download_counts.flush()
    after = await store.stub.GetFeedStatus(store_pb2.GetFeedStatusRequest())
    assert after.head_position == before.head_position


async def test_a_store_that_stops_writes_what_it_has_counted(store: Any, publish: Any, kit: Any) -> None:
    (version,) = await publish()
    await fetch(store, version)
    config = replace(store.config, folder=store.config.folder / "other")
    async with kit.running_store(config) as other:
        await download(store, version, WEIGHTS)
        other.stores.download_counts.note_canonical(replace(VERSION, digest=version.digest), 0)
    assert await counts(store, [version]) == [1]
    await store.stores.download_counts.flush()
    assert await counts(store, [version]) == [3]


async def test_counts_that_could_not_be_written_are_written_later(
    store: Any, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version,) = await publish()
    await fetch(store, version)

    async def write(_work: object) -> None:
        raise unavailable(Reason.STORE_UNREACHABLE, "away", retry_after=1.0)

    with monkeypatch.context() as patch:
        patch.setattr(store.stores.database, "write", write)
        with pytest.raises(MeshError, match="away"):
            await store.stores.download_counts.flush()
    await fetch(store, version)
    await store.stores.download_counts.flush()
    assert await counts(store, [version]) == [2]


async def test_many_versions_are_counted_in_batches_and_unknown_ones_not_at_all(
    store: Any, publish: Any
) -> None:
    versions = [*await publish(seeds=(1, 2)), *await publish("sql", seeds=(3,))]
    records = [replace(VERSION, digest=version.digest) for version in versions]
    unknown = [replace(VERSION, digest=digest_bytes(str(number).encode())) for number in range(450)]
    for record in [*unknown, *records * 3]:
        store.stores.download_counts.note_canonical(record, 0)
    await store.stores.download_counts.flush()
    assert await counts(store, [*versions, *unknown[:1]]) == [3, 3, 3, 0]


def test_the_card_alone_is_no_download(store: Any) -> None:
    downloads = store.stores.download_counts
    card = SourceFile("README.md", 9000, digest_bytes(b"card"))
    small = SourceFile("a.json", 3, digest_bytes(b"a"))
    for files in ((card,), (card, small)):
        downloads.note_file(replace(VERSION, source_files=files), card, 0)
    assert not downloads._counted
    downloads.note_file(replace(VERSION, source_files=(card, small)), small, 0)
    assert downloads._counted == {VERSION.digest: 1}


@pytest.mark.parametrize("digests", [["v1"], [VERSION.digest] * 1001])
async def test_counts_are_asked_by_digest_a_bounded_number_at_once(
    store: Any, kit: Any, digests: list[str]
) -> None:
    async with kit.refused() as errors:
        await store.stub.GetDownloadCounts(store_pb2.GetDownloadCountsRequest(digests=digests))
    assert errors[0].metadata["field"] == "digests"
