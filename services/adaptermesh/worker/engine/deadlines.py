"""When requests have to have ended."""

import heapq

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.request import Request
from adaptermesh.worker.engine.sequence import Sequence, SequenceState

_SLACK = 64


class Deadlines:
    """The deadlines of all requests that have one, the next one first. Under the engine's lock."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._compact_at = _SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, sequence: Sequence) -> None:
        if not sequence.request.deadline_ns:
            return
        if len(self._heap) >= self._compact_at:
            # Requests mostly end long before their deadline; without this they would stay here until then.
            self._heap = [item for item in self._heap if item[2].state is not SequenceState.ENDED]
            heapq.heapify(self._heap)
            self._compact_at = 2 * len(self._heap) + _SLACK
        heapq.heappush(self._heap, (sequence.request.deadline_ns, sequence.arrival, sequence))

    def take_expired(self, now_ns: int) -> list[Sequence]:
        """The requests whose deadline has passed and that have not ended."""
        expired = []
        while self._heap and self._heap[0][0] <= now_ns:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.state is not SequenceState.ENDED:
                expired.append(sequence)
        return expired

    def seconds_left(self, now_ns: int, most: float) -> float:
        """Time until the next deadline, in [0, most] seconds."""
        if not self._heap:
            return most
        return min(most, max(0.0, (self._heap[0][0] - now_ns) / 1e9))


def deadline_exceeded(request: Request) -> MeshError:
    return MeshError(
        Code.DEADLINE_EXCEEDED,
        Reason.DEADLINE_EXCEEDED,
        "the request's deadline has passed",
        metadata={"request_id": request.request_id},
    )
