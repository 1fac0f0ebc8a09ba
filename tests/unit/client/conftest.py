from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adaptermesh.client import MeshClient, StoreClient
from tests.unit.client.fake_services import FakeGateway, FakeStore, fake_store, serve


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """What peft's save_pretrained leaves, with weights that take several messages."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 6000)
    (folder / "README.md").write_text("# An adapter\n")
    return folder


@pytest.fixture(name="fake_store")
def _fake_store() -> FakeStore:
    return fake_store()


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
async def store(fake_store: FakeStore) -> AsyncIterator[StoreClient]:
    async with serve(fake_store) as address, StoreClient(address) as client:
        yield client


@pytest.fixture
async def mesh(gateway: FakeGateway) -> AsyncIterator[MeshClient]:
    async with serve(gateway) as address, MeshClient(address) as client:
        yield client
