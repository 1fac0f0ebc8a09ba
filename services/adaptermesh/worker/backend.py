"""What serves the requests behind this service: the native engine, and whatever else answers to this."""

from collections.abc import Callable
from typing import Protocol

from adaptermesh.core.errors import MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.request import Admission, Listener, Request
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView


class Backend(Protocol):
    """The part of `adaptermesh.worker.engine.Engine` that the service uses. All of it is thread-safe."""

    @property
    def healthy(self) -> bool:
        """False once it fails again and again."""
        ...

    def submit(self, request: Request, listener: Listener) -> Admission:
        """Queues a request; raises MeshError when it can't be taken."""
        ...

    def cancel(self, request_id: str) -> None:
        """Frees what the request holds; unknown ids are ignored."""
        ...

    def load(
        self,
        digest: str,
        tier: Tier,
        pin: bool,
        on_done: Callable[[MeshError | None], None],
        context: object | None = None,
    ) -> None:
        """Brings a version to a tier; `on_done` hears of the end, on any thread."""
        ...

    def unpin(self, digest: str) -> ResidencyView:
        """Lets a version go like any other; gives where it is now."""
        ...

    def evict(self, digest: str) -> None:
        """Drops a version from every tier; raises MeshError while requests use it."""
        ...

    def status(self) -> EngineStatus:
        """Load and residency now."""
        ...

    def set_change_callback(self, callback: Callable[[], None]) -> None:
        """Called on any thread when the status changed."""
        ...

    def start(self) -> None:
        """Starts the engine's thread."""
        ...

    def stop(self) -> None:
        """Ends everything; waits for the thread."""
        ...
