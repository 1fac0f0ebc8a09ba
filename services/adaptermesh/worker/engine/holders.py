"""Who wants adapters: requests, and loads ahead of any request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptermesh.core.errors import MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.request import Timeline

OnDone = Callable[[MeshError | None], None]
OnFailed = Callable[[Sequence[str], MeshError], None]


@dataclass(frozen=True, slots=True)
class Holder:
    """A request (with its timeline) or a load (with the tier that it asks for and whom it tells)."""

    holder_id: str
    digest: str
    context: object | None
    timeline: Timeline
    tier: Tier = Tier.DEVICE
    pin: bool = False
    on_done: OnDone | None = None


class Holders:
    """All holders by their id. Under the engine's lock."""

    def __init__(self, on_failed: OnFailed) -> None:
        self._on_failed = on_failed
        self._holders: dict[str, Holder] = {}
        self._loads: dict[str, Holder] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def __getitem__(self, holder_id: str) -> Holder:
        return self._holders[holder_id]

    @property
    def loads(self) -> tuple[Holder, ...]:
        return tuple(self._loads.values())

    def add(self, holder: Holder) -> None:
        self._holders[holder.holder_id] = holder
        if holder.on_done is not None:
            self._loads[holder.holder_id] = holder

    def remove(self, holder_id: str) -> None:
        self._holders.pop(holder_id, None)
        self._loads.pop(holder_id, None)

    def fail(self, holder_ids: Sequence[str], error: MeshError) -> None:
        """Tells the loads, hands the requests over, forgets both."""
        requests: list[str] = []
        for holder_id in holder_ids:
            holder = self._holders[holder_id]
            self.remove(holder_id)
            if holder.on_done is not None:
                holder.on_done(error)
            else:
                requests.append(holder_id)
        if requests:
            self._on_failed(requests, error)
