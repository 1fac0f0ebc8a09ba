"""An engine that does what the test says, on a thread of its own as the real one does."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.request import (
    Admission,
    FinishReason,
    Listener,
    Outcome,
    Request,
    Timeline,
)
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView, TierBudgets


def status(**fields: int) -> EngineStatus:
    values: dict[str, Any] = {
        "running": 0,
        "waiting": 0,
        "waiting_tokens": 0,
        "kv_used_tokens": 0,
        "kv_total_tokens": 1024,
    }
    return EngineStatus(**{**values, **fields}, residencies=())


class ScriptedEngine:
    """The service's `Backend`; the test plays the engine's thread with `play`."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.listeners: dict[str, Listener] = {}
        self._by_id: dict[str, Listener] = {}
        self.cancelled: list[str] = []
        self.loads: list[tuple[str, Tier, bool]] = []
        self.load_error: MeshError | None = None
        self.hold_loads = False
        self.evicted: list[str] = []
        self.refusal: MeshError | None = None
        self.refuse_after = 0
        """Requests that are taken in spite of `refusal`."""
        self.taken = 0
        self.tiers: dict[str, Tier] = {}
        self.healthy = True
        self.started = False
        self.stopped = False
        self._status = status()
        self._changed: Callable[[], None] = lambda: None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scripted-engine")

    def submit(self, request: Request, listener: Listener) -> Admission:
        if self.refusal is not None and self.taken >= self.refuse_after:
            raise self.refusal
        self.taken += 1
        name = _asked(request.request_id)
        self.requests[name] = request
        self.listeners[name] = listener
        self._by_id[request.request_id] = listener
        tier = Tier.NONE if request.digest is None else self.tiers.get(request.digest, Tier.STORE)
        return Admission(tier, len(request.prompt_ids))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(_asked(request_id))
        error = MeshError(Code.CANCELLED, Reason.CANCELLED, "cancelled")
        # Not by the asked name: another request of that name would end in this one's place.
        self._thread.submit(self._by_id[request_id].on_error, error)

    def load(
        self,
        digest: str,
        tier: Tier,
        pin: bool,
        on_done: Callable[[MeshError | None], None],
        context: object | None = None,
    ) -> None:
        self.loads.append((digest, tier, pin))
        if self.hold_loads:
            return
        if self.load_error is None:
            self.hold(ResidencyView(digest, tier, pinned=pin, requests=0, size_bytes=10))
        self._thread.submit(on_done, self.load_error)

    def unpin(self, digest: str) -> ResidencyView:
        for view in self._status.residencies:
            if view.digest == digest:
                self.hold(replace(view, pinned=False))
                return replace(view, pinned=False)
        return ResidencyView(digest, Tier.STORE, pinned=False, requests=0, size_bytes=0)

    def evict(self, digest: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.evicted.append(digest)
        self.drop(digest)

    def status(self) -> EngineStatus:
        return self._status

    def set_change_callback(self, callback: Callable[[], None]) -> None:
        self._changed = callback

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True
        self._thread.shutdown()

    def play(self, step: Callable[[], None]) -> None:
        """Runs a step on the engine's thread; returns when it is done, as it must never wait."""
        self._thread.submit(step).result(5)

    def tokens(
        self, request_id: str, text: str, *token_ids: int, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        self.play(lambda: self.listeners[request_id].on_tokens(text, list(token_ids), logprobs))

    def prompt(self, request_id: str, logprobs: Sequence[TokenLogprobs]) -> None:
        self.play(lambda: self.listeners[request_id].on_prompt(logprobs))

    def finish(self, request_id: str, timeline: Timeline | None = None) -> None:
        outcome = Outcome(FinishReason.STOP, 3, 2, timeline or Timeline(1, 0, 0, 0, 0, 2, 3, 4))
        self.play(lambda: self.listeners[request_id].on_finish(outcome))

    def fail(self, request_id: str, error: MeshError) -> None:
        self.play(lambda: self.listeners[request_id].on_error(error))

    def report(self, **fields: int | TierBudgets) -> None:
        """The load changed."""
        self._status = replace(self._status, **fields)  # type: ignore[arg-type]
        self._changed()

    def hold(self, *views: ResidencyView) -> None:
        """Versions came, or changed."""
        kept = {view.digest: view for view in (*self._status.residencies, *views)}
        self._status = replace(self._status, residencies=tuple(kept.values()))
        self._changed()

    def drop(self, digest: str) -> None:
        """A version went."""
        kept = tuple(view for view in self._status.residencies if view.digest != digest)
        self._status = replace(self._status, residencies=kept)
        self._changed()


def _asked(request_id: str) -> str:
    """The id that the caller gave; the service makes it unique."""
    return request_id.partition("#")[0]


class RecordingSink:
    """An `AdapterSink` that keeps what it gets and says when its fetch has ended."""

    def __init__(self) -> None:
        self.manifests: list[bytes] = []
        self.data = bytearray()
        self.error: Exception | None = None
        self.finished = False
        self.refuse_begin: MeshError | None = None
        self.refuse_write: MeshError | None = None
        self.threads: set[str] = set()
        self.writing = threading.Lock()
        self.overlapped = False
        self._ended = threading.Event()

    def begin(self, manifest: bytes) -> None:
        self.threads.add(threading.current_thread().name)
        self.manifests.append(manifest)
        if self.refuse_begin is not None:
            raise self.refuse_begin

    def write(self, data: bytes | memoryview) -> None:
        if not self.writing.acquire(blocking=False):
            self.overlapped = True
            return
        try:
            self.threads.add(threading.current_thread().name)
            if self.refuse_write is not None:
                raise self.refuse_write
            self.data += data
        finally:
            self.writing.release()

    def finish(self) -> None:
        self.finished = True
        self._ended.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._ended.set()

    def ended(self) -> bool:
        return self._ended.is_set()
