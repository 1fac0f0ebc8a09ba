"""For all tests: Triton's interpreter without an NVIDIA card, no time limit, logs as they were before."""

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.s3_server import S3Server

pytest_plugins = ["tests.postgres"]

# Triton reads it once, when it is imported first; torch and transformers import it on their own.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The card's machine may lack it.
if find_spec("hypothesis"):
    from hypothesis import settings

    # A busy machine is no failure: how long an example takes is never asserted.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A service that a test runs sends all logs to a stream that may be closed before the next test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers]
    root.handlers.extend(handler for handler in handlers if handler not in root.handlers)
    root.setLevel(level)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3Server]":
    """A real S3 server, for all tests that leave it running."""
    # Only where it is asked for: other machines may lack what it needs.
    from tests.s3_server import s3_server as running

    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server
