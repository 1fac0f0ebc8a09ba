"""The one place of this package that reads the environment."""

import os
from collections.abc import Mapping


def child_environment(own: Mapping[str, str]) -> dict[str, str]:
    """What a child process inherits, and what is set for it."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", **own}
