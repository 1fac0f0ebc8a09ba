"""Whether the versions of a namespace must be signed."""

import enum


class SignaturePolicy(enum.StrEnum):
    """What a namespace asks of its versions."""

    NONE = "none"
    REQUIRED = "required"
    """One without a signature by a trusted key must not be used."""
