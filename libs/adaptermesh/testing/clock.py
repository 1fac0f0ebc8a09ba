"""A clock for tests."""


class ManualClock:
    """Stands still until it is moved; both of its faces show the same."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves it forward."""
        self.now += seconds
