import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from adaptermesh.core.errors import MeshError
from adaptermesh.store.make_bucket import main, make_bucket
from adaptermesh.store.s3_blobs import S3BlobStore
from tests.s3_server import S3Server


async def test_a_bucket_is_made_once_and_a_store_can_use_it(s3_server: S3Server) -> None:
    config = replace(s3_server.config(), bucket=f"b-{uuid.uuid4().hex}")
    assert await make_bucket(config, 0)
    assert not await make_bucket(config, 0)
    blobs = S3BlobStore(config)
    await blobs.recover()
    await blobs.close()


async def test_a_server_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    server = S3Server(tmp_path / "late")
    making = asyncio.create_task(make_bucket(replace(server.config(), bucket="late", retries=0), 60))
    await asyncio.sleep(0)
    try:
        await asyncio.to_thread(server.start)
        assert await making
    finally:
        await asyncio.to_thread(server.kill)
    with pytest.raises(MeshError, match="does not answer"):
        await make_bucket(replace(server.config(), retries=0), 0)


def test_without_an_endpoint_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ADAPTERMESH_STORE_S3_ENDPOINT", raising=False)
    assert main() == 2
    assert "no S3 endpoint is set" in capsys.readouterr().err


def test_the_settings_say_which_bucket(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3_server.environment("").items():
        monkeypatch.setenv(name, value)
    assert main() == 0
    assert capsys.readouterr().err == "bucket 'adapters' was there\n"
