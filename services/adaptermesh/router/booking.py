"""Requests that were sent to a worker and that the worker has not reported yet.

Load is booked at dispatch, so that a burst does not fall on the worker whose last report looked idle. A
booking ends when the worker's report admits the request or after a bounded time. An adapter that is on its
way to a worker is expected there until the worker says where it is, so that concurrent first requests go to
one place.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from adaptermesh.core.clock import Clock


@dataclass(frozen=True, slots=True)
class Booking:
    """One request on its way to one worker."""

    worker_id: str
    expires: float


class Bookings:
    """All bookings and expectations of one router."""

    def __init__(self, clock: Clock, lifetime_seconds: float) -> None:
        self._clock = clock
        self._lifetime = lifetime_seconds
        # Both in the order of expiry: all live equally long, and what is renewed goes to the end.
        self._bookings: dict[str, Booking] = {}
        self._expected: dict[tuple[str, str], float] = {}
        self._counts: dict[str, int] = {}
        self._expecting: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._bookings)

    def book(self, request_id: str, worker_id: str) -> None:
        """Books a request. One that was booked before (it failed there) moves."""
        self._forget(request_id)
        self._bookings[request_id] = Booking(worker_id, self._clock.monotonic() + self._lifetime)
        self._counts[worker_id] = self._counts.get(worker_id, 0) + 1

    def expect(self, worker_id: str, digest: str) -> None:
        """An adapter is on its way to a worker."""
        self.located(worker_id, digest)
        self._expected[worker_id, digest] = self._clock.monotonic() + self._lifetime
        self._expecting.setdefault(digest, set()).add(worker_id)

    def admitted(self, worker_id: str, request_ids: Iterable[str]) -> None:
        """The worker's own load now counts these requests."""
        for request_id in request_ids:
            booking = self._bookings.get(request_id)
            if booking is not None and booking.worker_id == worker_id:
                self._forget(request_id)

    def located(self, worker_id: str, digest: str) -> None:
        """The worker has said where the adapter is: from now on that counts."""
        if self._expected.pop((worker_id, digest), None) is None:
            return
        workers = self._expecting[digest]
        workers.remove(worker_id)
        if not workers:
            del self._expecting[digest]

    def drop_worker(self, worker_id: str) -> None:
        """The worker is gone and so is what was sent there."""
        for request_id in [key for key, booking in self._bookings.items() if booking.worker_id == worker_id]:
            self._forget(request_id)
        for pair in [pair for pair in self._expected if pair[0] == worker_id]:
            self.located(*pair)

    def expire(self) -> None:
        """Forgets what is too old; costs only what it forgets."""
        now = self._clock.monotonic()
        while self._bookings:
            request_id, booking = next(iter(self._bookings.items()))
            if booking.expires > now:
                break
            self._forget(request_id)
        while self._expected:
            pair, expires = next(iter(self._expected.items()))
            if expires > now:
                break
            self.located(*pair)

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests on their way, by worker; workers without any are not in it."""
        return self._counts

    def expecting(self, digest: str) -> Collection[str]:
        """The workers that an adapter is on its way to."""
        return self._expecting.get(digest, ())

    def _forget(self, request_id: str) -> None:
        booking = self._bookings.pop(request_id, None)
        if booking is None:
            return
        left = self._counts[booking.worker_id] - 1
        if left:
            self._counts[booking.worker_id] = left
        else:
            del self._counts[booking.worker_id]
