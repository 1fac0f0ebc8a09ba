"""For all tests: Triton's interpreter where there is no NVIDIA card, and no example has a time limit."""

import os
from importlib.util import find_spec
from pathlib import Path

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
