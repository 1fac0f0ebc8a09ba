"""From a version to a worker: filters, then scorers. Pure: workers and bookings in, one worker out.

Filters leave the workers that can serve the request at all. Two scorers, each in [0, 1], rank them:
residency (how near the adapter is) and load. The weight of residency is such that it wins over any
difference in load, until a worker is clearly overloaded: it has no free row and a whole batch more to do
than the least loaded one. Then its residency counts nothing and load decides. Ties fall by rendezvous hash,
so that a cold adapter has one home.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.core.tiers import Tier
from adaptermesh.router.workers import Worker, WorkerState

RESIDENCY_WEIGHT = 3.0
"""Times the smallest step between two residency scores (0.2) this is 0.6: more than the 0.5 by which the load
scores of two workers can differ while neither is overloaded."""

_TIER_SCORES = (0.0, 0.0, 0.6, 0.8, 1.0)
"""By the numbers of the tiers: none, store, disk, host, device."""
_EXPECTED_SCORE = 0.4

# Looking up a member of an enum costs more than all else that a filter does.
_READY = WorkerState.READY
_NONE, _STORE = Tier.NONE, Tier.STORE


class BookedLoad(Protocol):
    """What was sent to workers and is not in their reports yet."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    def expecting(self, digest: str) -> Collection[str]: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a worker must have. `digest` None is the bare base."""

    base_digest: str
    digest: str | None
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pick:
    """The worker, where the adapter is on it (NONE for the base), and out of how many it was chosen."""

    worker: Worker
    tier: Tier
    candidates: int


def pick(workers: Sequence[Worker], wanted: Wanted, booked: BookedLoad, retry_after: float) -> Pick:
    """Chooses the worker of a request.

    Raises:
        MeshError: UNAVAILABLE (NO_WORKER) if no worker takes requests for the base; RESOURCE_EXHAUSTED
            (OVERLOADED) if the queue of each that does is full.
    """
    ready = [worker for worker in workers if serves(worker, wanted)]
    if not ready:
        raise unavailable(
            Reason.NO_WORKER,
            f"no live worker takes requests for base {wanted.base_digest}",
            retry_after,
            base_digest=wanted.base_digest,
        )
    counts = booked.counts
    counted = [(worker, outstanding(worker, counts)) for worker in ready]
    roomy = [(worker, requests) for worker, requests in counted if has_room(worker, requests)]
    if not roomy:
        raise MeshError(
            Code.RESOURCE_EXHAUSTED,
            Reason.OVERLOADED,
            f"the queue of every worker that serves base {wanted.base_digest} is full",
            metadata={"base_digest": wanted.base_digest, "workers": str(len(ready))},
            retry_after=retry_after,
        )
    expecting = () if wanted.digest is None else booked.expecting(wanted.digest)
    chosen = _best(roomy, wanted.digest, expecting)
    return Pick(chosen, tier_of(chosen, wanted.digest), len(roomy))


def serves(worker: Worker, wanted: Wanted) -> bool:
    """Filter: the right base, taking requests, and not one that has just failed for this request."""
    return (
        worker.state is _READY
        and worker.info.base_digest == wanted.base_digest
        and worker.info.worker_id not in wanted.excluded
    )


def has_room(worker: Worker, requests: int) -> bool:
    """Filter: neither the queue as reported is full nor the one that the bookings will make."""
    info = worker.info
    if requests >= info.max_batch_rows + info.max_waiting:
        return False
    return info.max_waiting == 0 or worker.load.waiting_requests < info.max_waiting


def outstanding(worker: Worker, booked: Mapping[str, int]) -> int:
    """Requests that the worker has or is about to get."""
    load = worker.load
    return load.running_requests + load.waiting_requests + booked.get(worker.info.worker_id, 0)


def tier_of(worker: Worker, digest: str | None) -> Tier:
    """Where the adapter is on the worker, as last reported; NONE for the base."""
    if digest is None:
        return _NONE
    residency = worker.residencies.get(digest)
    return _STORE if residency is None else residency.tier


def residency_score(tier: Tier, expected: bool) -> float:
    """How near the adapter is: 1 on the device, 0.4 on its way from the store, 0 not there. In [0, 1]."""
    score = _TIER_SCORES[tier]
    return _EXPECTED_SCORE if expected and score == 0.0 else score


def load_score(batches: float) -> float:
    """1 when idle, 1/2 with one batch outstanding, 1/3 with two, ... In (0, 1], falls without end."""
    return 1.0 / (1.0 + batches)


def is_overloaded(batches: float, least_batches: float) -> bool:
    """No free row, and a whole batch more to do than the least loaded worker."""
    return batches >= 1.0 and batches - least_batches >= 1.0


def home_order(digest: str | None, worker_id: str) -> bytes:
    """Rendezvous hash: the greatest one is the home. Removing a worker moves only what was at home there."""
    return hashlib.sha256(f"{digest or 'base'}\x00{worker_id}".encode()).digest()


def _best(roomy: Sequence[tuple[Worker, int]], digest: str | None, expecting: Collection[str]) -> Worker:
    loads = [requests / worker.info.max_batch_rows for worker, requests in roomy]
    least = min(loads)
    best: list[Worker] = []
    best_score = -1.0
    for (worker, _), batches in zip(roomy, loads, strict=True):
        score = load_score(batches)
        tier = tier_of(worker, digest)
        expected = worker.info.worker_id in expecting
        if (expected or tier > _STORE) and not is_overloaded(batches, least):
            score += RESIDENCY_WEIGHT * residency_score(tier, expected)
        if score > best_score:
            best, best_score = [worker], score
        elif score == best_score:
            best.append(worker)
    if len(best) == 1:
        return best[0]
    return max(best, key=lambda worker: home_order(digest, worker.info.worker_id))
