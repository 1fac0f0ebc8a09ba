"""For all tests: Triton's interpreter where there is no NVIDIA card, and no example has a time limit."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.s3_server import S3Server

# Triton reads it once, when it is imported first; torch and transformers import it on their own.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The card's machine may lack it.
if find_spec("hypothesis"):
    from hypothesis import settings

    # A busy machine is no failure: how long an example takes is never asserted.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3Server]":
    """A real S3 server, for all tests that leave it running."""
    # Only where it is asked for: other machines may lack what it needs.
    from tests.s3_server import s3_server as running

    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server
