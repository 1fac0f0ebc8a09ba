"""Delays between attempts: exponential with jitter, so that many callers do not come back at one moment."""

import random


class Backoff:
    """Doubles from `initial` to `maximum` seconds; each delay is drawn from its upper half."""

    def __init__(self, initial: float, maximum: float, rng: random.Random) -> None:
        self._initial = initial
        self._maximum = maximum
        self._rng = rng
        self._attempt = 0

    def next_delay(self) -> float:
        """The delay before the next attempt, in seconds."""
        # The exponent is capped: 2.0 ** 1024 would overflow after a long outage.
        ceiling = min(self._maximum, self._initial * 2.0 ** min(self._attempt, 32))
        self._attempt += 1
        return ceiling * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """After a success: the next delay is the first one again."""
        self._attempt = 0
