"""Whether a version should be used."""

import enum


class VersionState(enum.StrEnum):
    """What is said of a version after its upload."""

    ACTIVE = "active"
    DEPRECATED = "deprecated"
    """Served, with a warning."""
    REVOKED = "revoked"
    """Refused, wherever it is asked for."""
