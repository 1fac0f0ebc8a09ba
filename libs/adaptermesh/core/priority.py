"""A request's priority, checked wherever a request comes in."""

from adaptermesh.core.errors import invalid_field

MAX_PRIORITY = 100


def check_priority(priority: int) -> int:
    """Returns a priority in [-100, 100]; raises MeshError INVALID_ARGUMENT (INVALID_FIELD)."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise invalid_field("priority", f"{priority} is not in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    return priority
