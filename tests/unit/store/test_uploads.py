import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason


async def fetched(store: Any, digest: str) -> tuple[bytes, bytes]:
    manifest, data = b"", b""
    async for message in store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=digest)):
        manifest += message.manifest
        data += message.data
    return manifest, data


async def assert_nothing_is_left(store: Any) -> None:
    assert store.left_files() == []
    snapshot = await store.snapshot()
    assert not snapshot.versions
    assert snapshot.feed_position == 1
    assert not (await store.stub.ListAdapters(store_pb2.ListAdaptersRequest())).adapters


async def test_an_upload_becomes_version_1_and_can_be_read_back(store: Any, kit: Any) -> None:
    files = kit.make_files()
    done = await store.upload(files, task="financial-ner", description="Names.", tags=["b", "a"], author="me")
    version = done.version
    assert (done.created, done.feed_position, version.number) == (True, 2, 1)
    assert (version.namespace, version.name, version.task) == ("acme", "ner", "financial-ner")
    assert (version.kind, list(version.op_kinds), version.max_rank) == ("lora", ["lowrank"], 2)
    assert list(version.tags) == ["b", "a"]
    assert version.base_digest == kit.base_model().digest
    assert version.create_time.ToMicroseconds() > 0
    manifest, tensors = await fetched(store, version.digest)
    assert digest_bytes(manifest) == version.digest
    assert len(tensors) == version.size_bytes
    for chunk in Manifest.from_bytes(manifest).chunks:
        assert digest_bytes(tensors[chunk.offset : chunk.offset + chunk.size]) == chunk.sha256
    for source in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=source.path)
        data = b"".join([part.data async for part in store.stub.DownloadFile(request)])
        assert data == files[source.path]


async def test_the_same_upload_again_is_the_same_version(store: Any, kit: Any) -> None:
    first = await store.upload(kit.make_files())
    kept = store.left_files()
    again = await store.upload(kit.make_files())
    assert first.created
    assert not again.created
    assert again.version == first.version
    assert again.feed_position == first.feed_position
    assert store.left_files() == kept


async def test_the_same_upload_many_times_at_once_is_one_version(store: Any, kit: Any) -> None:
    done = await asyncio.gather(*(store.upload(kit.make_files()) for _ in range(6)))
    assert sum(outcome.created for outcome in done) == 1
    assert {outcome.version.digest for outcome in done} == {done[0].version.digest}
    assert {outcome.version.number for outcome in done} == {1}


async def test_concurrent_uploads_get_numbers_without_gaps(store: Any, kit: Any) -> None:
    done = await asyncio.gather(*(store.upload(kit.make_files(seed)) for seed in range(8)))
    assert sorted(outcome.version.number for outcome in done) == list(range(1, 9))
    assert sorted(outcome.feed_position for outcome in done) == list(range(2, 10))


async def test_validate_only_publishes_nothing(store: Any, kit: Any) -> None:
    checked = await store.upload(kit.make_files(), validate_only=True)
    assert not checked.created
    assert checked.version.number == 0
    assert not checked.version.HasField("create_time")
    await assert_nothing_is_left(store)
    published = await store.upload(kit.make_files())
    assert published.version.digest == checked.version.digest


async def test_validate_only_finds_the_version_that_is_there(store: Any, kit: Any) -> None:
    published = await store.upload(kit.make_files())
    checked = await store.upload(kit.make_files(), validate_only=True)
    assert checked.version == published.version
    assert not checked.created


async def test_the_base_may_be_given_by_digest(store: Any, kit: Any) -> None:
    done = await store.upload(kit.make_files(), base_model=kit.base_model().digest)
    assert done.version.base_model_id == "tiny-llama"


async def test_an_unknown_base_is_not_found_by_its_name(store: Any, kit: Any) -> None:
    async with kit.refused() as errors:
        await store.upload(kit.make_files(), base_model="no-such-model")
    assert (errors[0].code, errors[0].reason) == (Code.NOT_FOUND, Reason.BASE_NOT_FOUND)
    assert errors[0].metadata["name"] == "no-such-model"
    await assert_nothing_is_left(store)


async def test_a_base_name_that_two_models_have_is_refused(store: Any, kit: Any) -> None:
    other = kit.base_model(weights="others")
    await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=other))
    async with kit.refused() as errors:
        await store.upload(kit.make_files())
    assert errors[0].metadata["field"] == "base_model"
    done = await store.upload(kit.make_files(), base_model=other.digest)
    assert done.version.base_digest == other.digest


async def test_files_that_name_another_base_by_digest_are_refused_with_both_digests(
    store: Any, kit: Any
) -> None:
    other = digest_bytes(b"another base")
    async with kit.refused() as errors:
        await store.upload(kit.make_files(base_model_name_or_path=other))
    assert (errors[0].code, errors[0].reason) == (Code.FAILED_PRECONDITION, Reason.BASE_MISMATCH)
    assert other in errors[0].message
    assert kit.base_model().digest in errors[0].message
    await assert_nothing_is_left(store)


def with_nan(kit: Any) -> dict[str, bytes]:
    tensors = kit.make_tensors()
    next(iter(tensors.values()))[0, 0] = np.nan
    files: dict[str, bytes] = kit.make_files(tensors=tensors)
    return files


def truncated(kit: Any) -> dict[str, bytes]:
    files: dict[str, bytes] = kit.make_files()
    files["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-100]
    return files


def without_config(kit: Any) -> dict[str, bytes]:
    files: dict[str, bytes] = kit.make_files()
    del files["adapter_config.json"]
    return files


BAD_ADAPTERS = {
    "wrong_shape": lambda kit: kit.make_files(tensors=kit.make_tensors(width=8)),
    "nan": with_nan,
    "truncated": truncated,
    "wrong_rank": lambda kit: kit.make_files(rank=2, r=3),
    "without_config": without_config,
    "no_files_of_an_adapter": lambda kit: {"README.md": b"nothing else"},
}


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
async def test_a_bad_adapter_is_refused_and_leaves_nothing(store: Any, kit: Any, kind: str) -> None:
    async with kit.refused() as errors:
        await store.upload(BAD_ADAPTERS[kind](kit))
    assert (errors[0].code, errors[0].reason) == (Code.INVALID_ARGUMENT, Reason.ADAPTER_REJECTED)
    await assert_nothing_is_left(store)


def changed_source(kit: Any, files: dict[str, bytes], **fields: Any) -> store_pb2.UploadHeader:
    header: store_pb2.UploadHeader = kit.make_header(files)
    for name, value in fields.items():
        setattr(header.files[1], name, value)
    return header


BAD_STREAMS = {
    "wrong_digest": (lambda kit, files: changed_source(kit, files, digest=digest_bytes(b"x")), "digest"),
    "size_too_small": (lambda kit, files: changed_source(kit, files, size_bytes=1500), "beyond"),
    "size_too_large": (lambda kit, files: changed_source(kit, files, size_bytes=10**6), "ends after"),
    "no_such_digest": (lambda kit, files: changed_source(kit, files, digest="md5:0"), "no sha256 digest"),
    "negative_size": (lambda kit, files: changed_source(kit, files, size_bytes=-1), "negative"),
    "absolute_path": (lambda kit, files: changed_source(kit, files, path="/etc/passwd"), "relative path"),
    "path_upwards": (lambda kit, files: changed_source(kit, files, path="a/../../b"), "relative path"),
    "twice": (lambda kit, files: changed_source(kit, files, path="README.md"), "2 times"),
    "too_large": (lambda kit, files: changed_source(kit, files, size_bytes=2**40), "are allowed"),
    "no_files": (lambda kit, files: kit.make_header({}), "1 to 64 files"),
    "too_many_files": (lambda kit, files: kit.make_header({str(n): b"" for n in range(65)}), "1 to 64 files"),
    "bad_name": (lambda kit, files: kit.make_header(files, name="No Name"), "not a legal name"),
    "bad_namespace": (lambda kit, files: kit.make_header(files, namespace=""), "not a legal name"),
    "bad_task": (lambda kit, files: kit.make_header(files, task="two words"), "not a legal name"),
    "no_base": (lambda kit, files: kit.make_header(files, base_model=""), "base_model"),
    "long_description": (lambda kit, files: kit.make_header(files, description="é" * 2049), "description"),
    "many_tags": (lambda kit, files: kit.make_header(files, tags=[str(n) for n in range(33)]), "tags"),
    "long_tag": (lambda kit, files: kit.make_header(files, tags=["x" * 65]), "tags"),
    "tag_with_newline": (lambda kit, files: kit.make_header(files, tags=["a\nb"]), "control characters"),
    "long_license": (lambda kit, files: kit.make_header(files, license="x" * 257), "license"),
}


@pytest.mark.parametrize("kind", BAD_STREAMS)
async def test_a_stream_that_is_not_as_its_header_says_is_refused(store: Any, kit: Any, kind: str) -> None:
    make, message = BAD_STREAMS[kind]
    files = kit.make_files()
    async with kit.refused() as errors:
        await store.send(kit.make_requests(make(kit, files), files))
    assert errors[0].code is Code.INVALID_ARGUMENT
    assert message in errors[0].message
    await assert_nothing_is_left(store)


async def test_missing_bytes_are_named_with_their_file(store: Any, kit: Any) -> None:
    files = kit.make_files()
    header = kit.make_header(files)
    del files["README.md"]
    async with kit.refused() as errors:
        await store.send(kit.make_requests(header, files))
    assert errors[0].reason is Reason.INVALID_UPLOAD
    assert errors[0].metadata["file"] == "README.md"
    await assert_nothing_is_left(store)


async def test_bytes_after_the_last_file_are_refused(store: Any, kit: Any) -> None:
    files = kit.make_files()
    header = kit.make_header(files)
    async with kit.refused() as errors:
        await store.send(kit.make_requests(header, {**files, "more": b"x"}))
    assert "after the end" in errors[0].message
    await assert_nothing_is_left(store)


@pytest.mark.parametrize("size", [0, 2**20 + 1])
async def test_a_message_of_no_or_too_many_bytes_is_refused(store: Any, kit: Any, size: int) -> None:
    files = {"README.md": b"x" * (2**20 + 5)}
    requests = [
        store_pb2.UploadAdapterRequest(header=kit.make_header(files)),
        store_pb2.UploadAdapterRequest(data=b"x" * size),
    ]
    async with kit.refused() as errors:
        await store.send(requests)
    assert f"{size} bytes" in errors[0].message
    await assert_nothing_is_left(store)


@pytest.mark.parametrize("count", [0, 2])
async def test_a_stream_needs_one_header_first(store: Any, kit: Any, count: int) -> None:
    files = kit.make_files()
    header = store_pb2.UploadAdapterRequest(header=kit.make_header(files))
    requests = [header] * count or [store_pb2.UploadAdapterRequest(data=b"x")]
    async with kit.refused() as errors:
        await store.send(requests)
    assert errors[0].reason is Reason.INVALID_UPLOAD
    await assert_nothing_is_left(store)


async def test_an_upload_that_its_client_gives_up_leaves_nothing(store: Any, kit: Any) -> None:
    files = kit.make_files()
    staging = store.config.folder / "staging"

    async def unfinished() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
        for request in list(kit.make_requests(kit.make_header(files), files))[:-1]:
            yield request
        await asyncio.Event().wait()

    call = store.stub.UploadAdapter(unfinished())
    await kit.until(lambda: list(staging.glob("*/source-001")))
    call.cancel()
    await store.stores.uploads.drained()
    await assert_nothing_is_left(store)


async def test_an_upload_that_stops_sending_is_given_up(config: Any, kit: Any) -> None:
    impatient = kit.replace(config, uploads=kit.replace(config.uploads, idle_seconds=0.1))
    async with kit.running_store(impatient) as store:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        files = kit.make_files()

        async def silent(messages: int) -> AsyncIterator[store_pb2.UploadAdapterRequest]:
            for request in list(kit.make_requests(kit.make_header(files), files))[:messages]:
                yield request
            await asyncio.Event().wait()

        for messages in (0, 1, 2):
            async with kit.refused() as errors:
                await store.stub.UploadAdapter(silent(messages))
            assert errors[0].code is Code.DEADLINE_EXCEEDED
        await assert_nothing_is_left(store)


async def test_one_upload_too_many_is_told_when_to_retry(config: Any, kit: Any) -> None:
    small = kit.replace(config, uploads=kit.replace(config.uploads, concurrent=1))
    async with kit.running_store(small) as store:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        files = kit.make_files()
        rest = asyncio.Event()
        begun = asyncio.Event()

        async def slow() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
            requests = kit.make_requests(kit.make_header(files), files)
            yield next(requests)
            begun.set()
            await rest.wait()
            for request in requests:
                yield request

        first = asyncio.ensure_future(store.stub.UploadAdapter(slow()))
        await begun.wait()
        await kit.until(lambda: store.stores.uploads.active)
        async with kit.refused() as errors:
            await store.upload(kit.make_files(1))
        assert (errors[0].code, errors[0].reason) == (Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
        assert errors[0].retry_after
        rest.set()
        assert (await first).created
        assert (await store.upload(kit.make_files(1))).version.number == 2


async def test_a_full_disk_is_an_error_that_says_so(
    store: Any, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(digest: str, source: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.stores.blobs, "put", full)
    async with kit.refused() as errors:
        await store.upload(kit.make_files())
    assert errors[0].code is Code.RESOURCE_EXHAUSTED
    assert "full" in errors[0].message
    assert not (await store.snapshot()).versions


async def test_a_draining_store_takes_no_upload(store: Any, kit: Any) -> None:
    store.stores.drain()
    async with kit.refused() as errors:
        await store.upload(kit.make_files())
    assert (errors[0].code, errors[0].reason) == (Code.UNAVAILABLE, Reason.DRAINING)


async def test_a_client_that_hears_no_answer_may_still_have_published(store: Any, kit: Any) -> None:
    """After the last byte the upload is finished even if the call is gone: a repetition finds it."""
    files = kit.make_files()
    call = store.stub.UploadAdapter(kit.make_requests(kit.make_header(files), files))
    await kit.until(lambda: store.stores.uploads.finishing or call.done())
    call.cancel()
    await store.stores.uploads.drained()
    again = await store.upload(files)
    assert not again.created
    assert again.version.number == 1


CARD = b"""---
license: apache-2.0
language: en
tags: [finance]
datasets: [conll2003]
model-index:
- results:
  - task: {type: ner}
    dataset: {type: conll2003, split: test}
    metrics: [{type: f1, value: 0.91}]
---
Finds names.
"""


async def test_what_a_card_says_is_in_the_manifest_and_can_be_searched(store: Any, kit: Any) -> None:
    files = {**kit.make_files(), "README.md": CARD}
    version = (await store.upload(files, license="", tags=["own"])).version
    assert (version.license, list(version.tags), list(version.warnings)) == (
        "apache-2.0",
        ["own", "finance"],
        [],
    )
    resolved = await store.stub.ResolveRef(store_pb2.ResolveRefRequest(ref="acme/ner:v1"))
    manifest = Manifest.from_bytes(resolved.manifest)
    assert (manifest.languages, manifest.tags) == (("en",), ("finance", "own"))
    assert manifest.training_data == ({"name": "conll2003"},)
    assert manifest.metrics == (
        {"task": "ner", "dataset": "conll2003", "split": "test", "metric": "f1", "value": 0.91},
    )
    found = await store.stub.ListAdapters(store_pb2.ListAdaptersRequest(tags=["finance", "own"]))
    assert [one.newest.digest for one in found.adapters] == [version.digest]


async def test_the_publishers_license_goes_before_the_cards(store: Any, kit: Any) -> None:
    version = (await store.upload({**kit.make_files(), "README.md": CARD}, license="mit")).version
    assert version.license == "mit"


async def test_a_card_that_can_not_be_read_is_warned_of_and_kept(store: Any, kit: Any) -> None:
    version = (await store.upload({**kit.make_files(), "README.md": b"---\na: [\n---\nHi\n"})).version
    (warning,) = version.warnings
    assert "front matter can't be read" in warning
