"""How fast the engine computes, as the measure of how long a queue is."""

_HALF_LIFE_SECONDS = 10.0
_SHORTEST_SECONDS = 0.1
_LONGEST_SECONDS = 30.0
_UNKNOWN_SECONDS = 1.0


class Pace:
    """Tokens per second of the recent steps; a step counts half after ten seconds of computing."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A step of that many tokens took that long."""
        weight = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._tokens = self._tokens * weight + tokens
        self._seconds = self._seconds * weight + seconds

    def seconds_for(self, tokens: int) -> float:
        """Time to compute that many tokens, in [0.1, 30] seconds; 1 while nothing was measured."""
        if self._seconds <= 0.0 or self._tokens <= 0.0:
            return _UNKNOWN_SECONDS
        seconds = tokens * self._seconds / self._tokens
        return min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, seconds))
