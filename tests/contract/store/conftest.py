"""What every backend of the store must do. A new backend joins by one more parameter."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from adaptermesh.core.clock import SystemClock
from adaptermesh.store.blobs import BlobStore, FolderBlobStore
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.s3_blobs import S3BlobStore
from adaptermesh.store.stores import StoreConfig, Stores
from tests.s3_server import S3Server


@pytest.fixture(params=["folder", "s3"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    """An empty blob store."""
    store: BlobStore = FolderBlobStore(tmp_path / "blobs")
    if request.param == "s3":
        # Parts as small as S3 takes them.
        server: S3Server = request.getfixturevalue("s3_server")
        store = S3BlobStore(replace(server.config(), part_bytes=5 * 2**20))
    await store.recover()
    yield store
    await store.close()


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
