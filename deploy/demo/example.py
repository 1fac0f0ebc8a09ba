"""One example of a demo task, and how word lists are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A user message and the answer that is wanted."""

    prompt: str
    answer: str


def words(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(","))
