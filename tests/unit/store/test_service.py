import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.clock import SystemClock
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.store.service import GRPC_NAME, StoreService, store_config
from adaptermesh.store.settings import StoreSettings
from adaptermesh.telemetry.tracing import no_tracing


@pytest.fixture
def settings(tmp_path: Path) -> StoreSettings:
    return StoreSettings(home=tmp_path, port=0, traces="", drain_seconds=20)


def test_everything_is_in_the_home_folder_unless_it_is_set(settings: StoreSettings, tmp_path: Path) -> None:
    config = store_config(settings)
    assert config.folder == tmp_path / "store"
    assert config.database.url == f"sqlite+aiosqlite:///{tmp_path}/store/catalogue.db"


def test_every_setting_reaches_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "DATABASE_URL": "sqlite+aiosqlite:////data/c.db",
        "BLOBS": str(tmp_path / "bytes"),
        "MAX_UPLOAD_BYTES": "1",
        "MAX_UPLOAD_FILES": "2",
        "CONCURRENT_UPLOADS": "3",
        "UPLOAD_IDLE_SECONDS": "4",
        "INGEST_THREADS": "5",
        "DATABASE_CONNECTIONS": "6",
        "DATABASE_BUSY_SECONDS": "7",
        "HEARTBEAT_SECONDS": "8",
        "CONCURRENT_SNAPSHOTS": "9",
        "SNAPSHOT_SECONDS": "10",
        "UPLOAD_SESSION_SECONDS": "11",
        "UPLOAD_TOTAL_SECONDS": "18",
        "MAX_UPLOAD_SESSIONS": "12",
        "MAX_UPLOAD_SESSION_BYTES": "13",
        "CONCURRENT_PARTS": "14",
        "FEED_MAX_AGE_SECONDS": "15",
        "FEED_MAX_CHANGES": "17",
        "FEED_MIN_CHANGES": "16",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"ADAPTERMESH_STORE_{name}", value)
    config = store_config(StoreSettings())
    assert (config.database.url, config.folder) == (values["DATABASE_URL"], tmp_path / "bytes")
    uploads = config.uploads
    assert (uploads.max_bytes, uploads.max_files, uploads.concurrent) == (1, 2, 3)
    assert (uploads.idle_seconds, uploads.ingest_threads) == (4, 5)
    assert (config.database.connections, config.database.busy_seconds) == (6, 7)
    assert config.feed.heartbeat_seconds == 8
    assert (config.snapshots.concurrent, config.snapshots.seconds) == (9, 10)
    assert config.uploads.total_seconds == 18
    sessions = config.sessions
    assert (sessions.seconds, sessions.most, sessions.most_bytes) == (11, 12, 13)
    assert (sessions.parts_at_once, sessions.idle_seconds) == (14, 4)
    kept = config.retention
    assert (kept.max_age_seconds, kept.max_changes, kept.min_changes) == (15, 17, 16)


def test_no_more_changes_can_be_kept_for_certain_than_are_kept_at_all() -> None:
    with pytest.raises(ValidationError, match="feed_min_changes"):
        StoreSettings(feed_min_changes=3, feed_max_changes=2)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///x",
        "catalogue.db",
        "postgresql://u:hunter2@h/d",
        "postgresql+asyncpg://u:hunter2@h",
        "postgresql+asyncpg:///d?password=hunter2",
        # What is special in a URL must be escaped.
        "postgresql+asyncpg://u:hunter2@more@h/d",
        "postgresql+asyncpg://u:hunter2/more@h:1:2/d",
    ],
)
def test_a_database_that_the_store_can_not_use_is_refused_at_once_without_its_password(url: str) -> None:
    with pytest.raises(ValidationError, match="sqlite") as caught:
        StoreSettings(database_url=SecretStr(url))
    assert "hunter2" not in str(caught.value)


def test_a_password_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+asyncpg://mesh:hunter2@h:5432/d"
    monkeypatch.setenv("ADAPTERMESH_STORE_DATABASE_URL", url)
    settings = StoreSettings(home=tmp_path)
    config = store_config(settings)
    assert config.database.url == url
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(config)):
        assert "hunter2" not in shown


def test_the_bytes_are_in_the_bucket_that_is_set_and_in_the_folder_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert store_config(StoreSettings()).s3 is None
    values = {
        "ENDPOINT": "minio:9000",
        "BUCKET": "b",
        "PREFIX": "mesh",
        "REGION": "eu-west-1",
        "ACCESS_KEY": "key",
        "SECRET_KEY": "not to be seen",
        "SECURE": "false",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"ADAPTERMESH_STORE_S3_{name}", value)
    settings = StoreSettings()
    expected = S3Config("minio:9000", "b", "mesh", "eu-west-1", "key", "not to be seen", secure=False)
    config = store_config(settings)
    assert config.s3 == expected
    assert "not to be seen" not in f"{settings!r} {settings} {settings.model_dump_json()} {config!r}"


@pytest.mark.parametrize(
    "values",
    [
        {"s3_endpoint": "http://minio:9000"},
        {"s3_access_key": "key"},
        {"s3_secret_key": "not to be seen"},
        {"s3_secret_key": "not to be seen", "s3_endpoint": "a/b"},
    ],
)
def test_s3_settings_that_make_no_sense_are_refused_without_the_secret(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        StoreSettings.model_validate(values)
    assert "not to be seen" not in str(caught.value)


async def test_a_draining_service_finishes_the_upload_that_has_begun(
    settings: StoreSettings, kit: Any
) -> None:
    server = MeshServer(GRPC_NAME, ServerConfig(), no_tracing())
    service = StoreService(ServiceContext(settings, no_tracing(), SystemClock(), server))
    service.register(server)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        async with kit.refused() as errors:
            await stub.UploadAdapter(kit.make_requests(kit.make_header({}), {}))
        assert errors[0].retry_after
        await service.start()
        await stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=kit.base_model()))
        files = kit.make_files()
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[store_pb2.UploadAdapterRequest]:
            requests = list(kit.make_requests(kit.make_header(files), files))
            for request in requests[:2]:
                yield request
            begun.set()
            await go_on.wait()
            for request in requests[2:]:
                yield request

        uploading = asyncio.ensure_future(stub.UploadAdapter(slow()))
        await begun.wait()
        await kit.until(lambda: list((settings.home / "store" / "staging").iterdir()))
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        go_on.set()
        assert (await uploading).created
        await draining
    await server.stop(grace=0)
    await service.stop()
