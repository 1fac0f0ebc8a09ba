"""What a change of an alias did."""

import enum


class AliasAction(enum.StrEnum):
    """Every one is an entry of the alias' history."""

    SET = "set"
    """Set for the first time, moved or rolled back."""
    PROTECTED = "protected"
    UNPROTECTED = "unprotected"
    DELETED = "deleted"
