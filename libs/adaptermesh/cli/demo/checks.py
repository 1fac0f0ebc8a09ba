"""The demonstration checks itself: what it shows is also what must have happened."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation and whether it held."""

    what: str
    held: bool
    detail: str = ""


@dataclass(slots=True)
class Checks:
    """All of them."""

    made: list[Check] = field(default_factory=list)

    def expect(self, held: bool, what: str, detail: str = "") -> None:
        """Notes an expectation; `detail` says what happened instead."""
        self.made.append(Check(what, held, "" if held else detail))

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.made if not check.held]
