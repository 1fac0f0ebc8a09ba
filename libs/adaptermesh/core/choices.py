"""How many answers one request asks for, checked wherever a request comes in."""

from adaptermesh.core.errors import invalid_field

MAX_CHOICES = 8


def check_choices(n: int) -> int:
    """Returns a number of answers in [1, 8]; raises MeshError INVALID_ARGUMENT (INVALID_FIELD)."""
    if not 1 <= n <= MAX_CHOICES:
        raise invalid_field("n", f"{n} is not in [1, {MAX_CHOICES}]")
    return n
