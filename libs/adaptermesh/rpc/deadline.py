"""Deadlines travel with the request."""

from typing import Any


def time_remaining(context: Any) -> float | None:
    """Seconds until the caller's deadline; None if it set none."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, float(remaining))


def bounded(remaining: float | None, limit: float) -> float:
    """The smaller of what remains and a limit, both in seconds."""
    return limit if remaining is None else min(remaining, limit)
