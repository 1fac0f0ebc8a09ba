"""Where an adapter's bytes are, seen from one worker."""

import enum


class Tier(enum.IntEnum):
    """Ordered by nearness to the device; the numbers are those of the wire."""

    NONE = 0
    """Does not apply: the bare base model."""
    STORE = 1
    DISK = 2
    HOST = 3
    DEVICE = 4
