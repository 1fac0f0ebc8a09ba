"""What services can ask of their callers."""

import enum


class Credentials(enum.StrEnum):
    """What a caller must show."""

    NONE = "none"
    KEYS = "keys"
