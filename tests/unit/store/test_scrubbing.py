import asyncio
import io
from typing import Any

import pytest

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason


@pytest.fixture
async def store(either: Any, kit: Any) -> Any:
    async with kit.running_store(either) as running:
        await running.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        yield running


async def verify(store: Any, digest: str = "") -> dict[str, str]:
    """Problems by blob."""
    request = store_pb2.VerifyBlobsRequest(digest=digest)
    checks = [check async for check in store.stub.VerifyBlobs(request)]
    found = {check.blob_digest: check.problem for check in checks}
    assert len(found) == len(checks)
    return found


async def damage(store: Any, digest: str, content: bytes) -> None:
    blobs = store.stores.blobs
    if store.config.s3 is None:
        await asyncio.to_thread(blobs._path(digest).write_bytes, content)
    else:
        bucket = store.config.s3.bucket
        arguments = (bucket, blobs._key(digest), io.BytesIO(content), len(content))
        await asyncio.to_thread(blobs._client.put_object, *arguments)


async def test_every_blob_of_a_version_is_read_again(store: Any, kit: Any) -> None:
    version = (await store.upload(kit.make_files(1))).version
    other = (await store.upload(kit.make_files(2))).version
    stored = await store.stores.catalogue.get_digest(version.digest)
    files = {file.digest for file in version.source_files}
    assert await verify(store, version.digest) == dict.fromkeys(
        {version.digest, stored.tensor_digest} | files, ""
    )
    everything = await verify(store)
    assert set(everything) >= files | {file.digest for file in other.source_files}
    assert set(everything.values()) == {""}


async def test_a_blob_that_is_damaged_cut_or_missing_is_named(store: Any, kit: Any) -> None:
    files = kit.make_files()
    version = (await store.upload(files)).version
    stored = await store.stores.catalogue.get_digest(version.digest)
    weights = digest_bytes(files["adapter_model.safetensors"])
    data = bytearray(files["adapter_model.safetensors"])
    data[-1] ^= 1
    await damage(store, weights, bytes(data))
    await damage(store, version.digest, b"{}")
    await store.stores.blobs.delete(stored.tensor_digest)
    found = await verify(store, version.digest)
    assert digest_bytes(bytes(data)) in found[weights]
    assert "digest" in found[version.digest]
    assert "missing" in found[stored.tensor_digest]
    assert sum(map(bool, found.values())) == 3
    assert {digest for digest, problem in (await verify(store)).items() if problem} == {
        weights,
        version.digest,
        stored.tensor_digest,
    }


async def test_what_the_catalogue_names_and_the_backend_lacks_is_corrupt_to_a_reader(
    store: Any, kit: Any
) -> None:
    files = kit.make_files()
    version = (await store.upload(files)).version
    weights = digest_bytes(files["adapter_model.safetensors"])
    request = store_pb2.DownloadFileRequest(digest=version.digest, path="adapter_model.safetensors")
    await damage(store, weights, b"cut")
    for _ in range(2):
        async with kit.refused() as errors:
            await store.stub.DownloadFile(request).read()
        assert (errors[0].code, errors[0].reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
        await store.stores.blobs.delete(weights)


async def test_a_version_that_is_not_there_is_not_found(store: Any, kit: Any) -> None:
    async with kit.refused() as errors:
        await verify(store, digest_bytes(b"nothing"))
    assert errors[0].reason is Reason.VERSION_NOT_FOUND
    assert await verify(store) == {}
