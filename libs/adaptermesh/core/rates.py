"""How often tenants may call: a bucket for each, that fills evenly over a minute."""

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason

_MINUTE = 60.0
_REMEMBERED = 4096


class Rates:
    """The buckets of one process. A tenant's first calls find a full one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Of each tenant how many calls there were left at which moment."""

    def take(self, tenant: str, per_minute: int) -> None:
        """Counts a call; 0 a minute is no bound. Raises MeshError QUOTA_EXCEEDED with when to come again."""
        if not per_minute:
            return
        now = self._clock.monotonic()
        left, since = self._buckets.get(tenant, (float(per_minute), now))
        left = min(float(per_minute), left + (now - since) * per_minute / _MINUTE)
        if left < 1:
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.QUOTA_EXCEEDED,
                f"tenant '{tenant}' may call {per_minute} times a minute",
                metadata={"tenant": tenant, "quota": "requests_per_minute", "limit": str(per_minute)},
                retry_after=(1 - left) * _MINUTE / per_minute,
            )
        if len(self._buckets) >= _REMEMBERED:
            # Those that have been full for a while would come back as they are.
            self._buckets = {name: kept for name, kept in self._buckets.items() if now - kept[1] < _MINUTE}
        self._buckets[tenant] = (left - 1, now)
