"""A store process that can't use its bucket says why and ends."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.store_process import Place
from tests.s3_server import SECRET_KEY, S3Server, free_ports


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("BUCKET", "nowhere", "has no bucket 'nowhere'"),
        ("SECRET_KEY", "wrong", "refuses the store's credentials"),
        ("ENDPOINT", f"127.0.0.1:{free_ports(1)[0]}", "does not answer"),
        ("ENDPOINT", "http://127.0.0.1", "must be host:port"),
        ("ACCESS_KEY", "", "needs its secret key"),
    ],
)
async def test_a_bucket_that_can_not_be_used_is_told_at_the_start_without_the_secret(
    s3_server: S3Server, tmp_path: Path, name: str, value: str, words: str
) -> None:
    environment = {**Place.new(tmp_path, s3_server).environment(), f"ADAPTERMESH_STORE_S3_{name}": value}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "adaptermesh.store"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert SECRET_KEY not in done.stderr
