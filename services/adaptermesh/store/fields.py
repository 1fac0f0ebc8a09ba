"""Limits on what a request may hold."""

from adaptermesh.core.errors import invalid_field

MAX_INT64 = 2**63 - 1
MAX_ACTOR = 256
MAX_COMMENT = 1024


def check_text(field: str, text: str, limit: int, *, required: bool = False) -> str:
    """Returns the text if it fits.

    Args:
        field: its name, for the error.
        text: what was sent.
        limit: how many characters it may have.
        required: whether it may be empty.
    """
    if required and not text:
        raise invalid_field(field, "must not be empty")
    if len(text) > limit:
        raise invalid_field(field, f"has {len(text)} characters, at most {limit} are allowed")
    if "\0" in text:
        # PostgreSQL can't keep it.
        raise invalid_field(field, "must not hold a NUL character")
    return text


def check_line(field: str, text: str, limit: int, *, required: bool = False) -> str:
    """As `check_text`; control characters are refused too."""
    check_text(field, text, limit, required=required)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise invalid_field(field, "must not hold control characters")
    return text


def check_generation(generation: int | None) -> int | None:
    """Returns an expected generation if it can be one."""
    if generation is not None and generation < 0:
        raise invalid_field("expected_generation", "must not be negative")
    return generation


def check_version_number(number: int) -> int:
    """Returns the number if a version can have it."""
    if not 1 <= number < 2**31:
        raise invalid_field("version_number", "must be at least 1")
    return number
