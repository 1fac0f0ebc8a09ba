"""Folders of the adapters library, through the store's own service."""

import json
from typing import Any

import pytest

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from tests.parity.adapters.goldens import ROOT, files_in, load_goldens

FACTS = load_goldens("llama").facts


@pytest.fixture(name="golden_store")
async def _golden_store(empty_store: Any) -> Any:
    facts = FACTS.to_json()
    config = json.dumps(facts.pop("config"))
    base = adapter_pb2.BaseModel(**facts, config_json=config)
    await empty_store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base))
    return empty_store


@pytest.mark.parametrize(
    ("method", "servable"),
    [
        ("double_seq_bn", True),
        ("with_class_head", True),
        ("mam", True),
        ("fuse_dynamic", True),
        ("fusion", False),
        ("stack", True),
    ],
)
async def test_a_folder_becomes_a_version_and_comes_back_byte_for_byte(
    golden_store: Any, method: str, servable: bool
) -> None:
    files = {path: place.read_bytes() for path, place in files_in(ROOT / "llama" / method).items()}
    version = (await golden_store.upload(files, base_model="golden")).version
    assert version.servable == servable
    assert bool(version.unservable_reason) != servable
    manifest = b""
    async for message in golden_store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=version.digest)):
        manifest += message.manifest
    assert digest_bytes(manifest) == version.digest
    assert Manifest.from_bytes(manifest).source.format == "adapters"
    for source in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=source.path)
        data = b"".join([part.data async for part in golden_store.stub.DownloadFile(request)])
        assert data == files[source.path]
