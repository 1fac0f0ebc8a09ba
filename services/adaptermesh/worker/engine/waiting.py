"""The requests that wait, and the order in which they may join the batch."""

import heapq
from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.fairness import TenantCounters
from adaptermesh.worker.engine.sequence import Sequence, SequenceState


@dataclass(slots=True, eq=False)
class PriorityGroup:
    """The waiting requests of one priority, by tenant, each tenant's in order of arrival.

    `overtakes` counts the requests of higher priority that joined since one of this group did.
    """

    priority: int
    tenants: dict[str, list[Sequence]] = field(default_factory=dict)
    overtakes: int = 0


class WaitingQueue:
    """Higher priority first, then the tenant that was served least, then order of arrival.

    Priorities age by group, so that nobody waits for ever and fairness within a group is kept: a group gains
    one level for every `priority_overtakes` requests of higher priority that join while it waits, and loses
    what it gained when one of its own joins. A group that lies k levels below a flood so gets at least one
    of (k * priority_overtakes + 1) places, and its tenants share these fairly.
    """

    def __init__(self, config: EngineConfig, counters: TenantCounters) -> None:
        self._overtakes_per_level = config.priority_overtakes
        self._max_overtakes = config.max_overtakes
        self._counters = counters
        self._groups: dict[int, PriorityGroup] = {}
        self._tenants: dict[str, int] = {}
        self._starving: dict[str, Sequence] = {}
        self._count = 0
        self.tokens = 0
        """Tokens of all waiting requests that have to be computed."""

    def __len__(self) -> int:
        return self._count

    @property
    def tenants(self) -> Collection[str]:
        return self._tenants.keys()

    @property
    def starving(self) -> Collection[Sequence]:
        """Requests that were overtaken too often, the one that has been so for longest first."""
        return self._starving.values()

    def add(self, sequence: Sequence) -> None:
        """A new request, or a preempted one, which gets its old place."""
        tenant = sequence.request.tenant
        if tenant not in self._tenants:
            self._counters.join(tenant, self._tenants)
        self._tenants[tenant] = self._tenants.get(tenant, 0) + 1
        priority = sequence.request.priority
        group = self._groups.setdefault(priority, PriorityGroup(priority))
        insort(group.tenants.setdefault(tenant, []), sequence, key=_arrival)
        self._count += 1
        self.tokens += len(sequence.tokens)
        self.overtake(sequence, 0)

    def remove(self, sequence: Sequence) -> None:
        """A waiting request doesn't wait any more."""
        tenant = sequence.request.tenant
        group = self._groups[sequence.request.priority]
        group.tenants[tenant].remove(sequence)
        if not group.tenants[tenant]:
            del group.tenants[tenant]
        if not group.tenants:
            del self._groups[group.priority]
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
            self._counters.leave(tenant)
        self._count -= 1
        self.tokens -= len(sequence.tokens)
        self._starving.pop(sequence.request.request_id, None)

    def join(self, sequence: Sequence) -> None:
        """A waiting request joins the batch: the groups below it age, its own is young again.

        The request keeps the level it had, or it could lose its row at once to those that it waited for.
        """
        sequence.level = self._level(self._groups[sequence.request.priority])
        self.remove(sequence)
        for group in self._groups.values():
            if group.priority < sequence.request.priority:
                group.overtakes += 1
            elif group.priority == sequence.request.priority:
                group.overtakes = 0

    def overtake(self, sequence: Sequence, times: int) -> None:
        """A waiting request was passed for want of its adapter."""
        sequence.overtaken += times
        if sequence.overtaken >= self._max_overtakes and sequence.digest is not None:
            self._starving.setdefault(sequence.request.request_id, sequence)

    def in_order(self) -> Iterator[Sequence]:
        """All requests, best first, with the order found as it is asked for.

        The caller may let the request that it was given join, and charge its tenant; nothing else may change
        meanwhile. Work: a look at each waiting tenant, then one heap operation a request.
        """
        scans = [_Scan(group, self._counters) for group in self._groups.values()]
        while scans:
            scan = max(scans, key=self._rank)
            for sequence in scan:
                yield sequence
                if sequence.state is not SequenceState.WAITING:
                    # It joined: the groups' ages have changed.
                    break
            else:
                scans.remove(scan)

    def _rank(self, scan: "_Scan") -> tuple[int, int]:
        return self._level(scan.group), scan.group.priority

    def _level(self, group: PriorityGroup) -> int:
        return group.priority + group.overtakes // self._overtakes_per_level


class _Scan:
    """One walk over a group; the heap holds the next request of each tenant."""

    def __init__(self, group: PriorityGroup, counters: TenantCounters) -> None:
        self.group = group
        self._counters = counters
        self._heap = [
            (counters.served(tenant), queue[0].arrival, tenant, 0) for tenant, queue in group.tenants.items()
        ]
        heapq.heapify(self._heap)
        self._given: tuple[Sequence, int] | None = None

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        self._put_back()
        while self._heap:
            served, _, tenant, index = self._heap[0]
            if self._counters.served(tenant) > served:
                # Charged for a request of another group: counters only grow, so this is found in time.
                self._put(tenant, index, replace=True)
                continue
            heapq.heappop(self._heap)
            sequence = self.group.tenants[tenant][index]
            self._given = sequence, index
            return sequence
        raise StopIteration

    def _put_back(self) -> None:
        """The tenant's next request takes the place of the one that was given out."""
        if self._given is None:
            return
        sequence, index = self._given
        self._given = None
        waits = sequence.state is SequenceState.WAITING
        self._put(sequence.request.tenant, index + 1 if waits else index, replace=False)

    def _put(self, tenant: str, index: int, *, replace: bool) -> None:
        queue = self.group.tenants.get(tenant, [])
        if index >= len(queue):
            return
        item = (self._counters.served(tenant), queue[index].arrival, tenant, index)
        if replace:
            heapq.heapreplace(self._heap, item)
        else:
            heapq.heappush(self._heap, item)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
