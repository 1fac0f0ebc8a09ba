"""For all tests: Triton's interpreter without an NVIDIA card, no time limit, logs as they were before."""

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

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
