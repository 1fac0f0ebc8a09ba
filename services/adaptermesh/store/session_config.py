"""What uploads in parts may cost, and the digests under which the database knows them."""

from dataclasses import dataclass

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import invalid_field

_MAX_KEY = 128


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds."""

    seconds: float = 24 * 3600.0
    """An upload to which nothing comes for so long is given up."""
    most: int = 256
    most_bytes: int = 64 * 2**30
    """Of all uploads that have begun and not ended."""
    parts_at_once: int = 16
    idle_seconds: float = 60.0
    """A part that stops in the middle for so long is given up, and how long one waits for its turn."""
    part_seconds: float = 600.0
    """How long one part may take: a client that sends byte by byte must not keep its turn."""


def session_id_of(key: str) -> str:
    """The database has no keys, so that who reads it can't continue an upload."""
    if not 0 < len(key) <= _MAX_KEY:
        raise invalid_field("upload_id", f"needs 1 to {_MAX_KEY} characters")
    return digest_bytes(key.encode())
