"""What every backend of the store must do. A new backend joins by one more parameter."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adaptermesh.core.clock import SystemClock
from adaptermesh.store.blobs import BlobStore, FolderBlobStore
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.stores import StoreConfig, Stores


@pytest.fixture(params=["folder"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    """An empty blob store."""
    if request.param == "folder":
        store = FolderBlobStore(tmp_path / "blobs")
        await store.recover()
        yield store


@pytest.fixture
async def stores(database_url: str, tmp_path: Path) -> AsyncIterator[Stores]:
    """An empty catalogue."""
    config = StoreConfig(
        folder=tmp_path,
        database=DatabaseConfig(url=database_url),
        feed=FeedConfig(heartbeat_seconds=0.2),
    )
    opened = Stores(config, SystemClock())
    await opened.open()
    yield opened
    await opened.close()
