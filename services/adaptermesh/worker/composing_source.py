"""Compositions for the engine: fetched as their members, composed here, handed over as one adapter."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, StatusCode, Tracer

from adaptermesh.artifact.canonical import verify_file
from adaptermesh.artifact.composing import MAX_COMPOSED_BYTES, Member, compose
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.composition import Composition, leaves
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.host_arena import corrupt
from adaptermesh.worker.engine.source import AdapterSink

log = logging.getLogger(__name__)

_REMEMBERED = 4096
_PIECE_BYTES = 2**20
_AT_ONCE = 4

_Value = TypeVar("_Value")


class MemberSource(Protocol):
    """Where versions come from; all methods from any thread."""

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None: ...

    def fetch_member(self, digest: str, sink: AdapterSink, context: object | None) -> None: ...

    def cancel(self, digest: str) -> None: ...

    def span_of(self, digest: str) -> SpanContext | None: ...


class ComposingSource:
    """The engine's `AdapterSource`: what it knows as a composition it composes, all else it passes on.

    A few compositions are on their way at a time, so that the members in memory are bounded; the others wait
    for their turn. One is composed at a time, beside the engine.
    """

    def __init__(self, members: MemberSource, tracer: Tracer) -> None:
        self._members = members
        self._tracer = tracer
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Composition] = OrderedDict()
        self._spans: OrderedDict[str, SpanContext] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compose")
        self._running = 0
        self._waiting: deque[_Job] = deque()

    def learn(self, digest: str, composition: Composition) -> None:
        """What a digest stands for; the latest some thousand are known."""
        with self._lock:
            _remember(self._known, digest, composition)

    def fetch(self, digest: str, sink: AdapterSink, context: object | None) -> None:
        """As `AdapterSource` says. A composition's members are given up by nobody: others may want them."""
        with self._lock:
            composition = self._known.get(digest)
        if composition is None:
            self._members.fetch(digest, sink, context)
            return
        members = list(dict.fromkeys(leaf.name for leaf in leaves(composition)))
        span = self._tracer.start_span(
            "adapter.compose",
            context=context if isinstance(context, Context) else Context(),
            attributes={
                "adaptermesh.adapter.digest": digest,
                "adaptermesh.composition.members": len(members),
            },
        )
        with self._lock:
            _remember(self._spans, digest, span.get_span_context())
        job = _Job(composition, sink, span, tuple(members), self._executor.submit, self._ended)
        with self._lock:
            self._waiting.append(job)
        self._start_next()

    def _start_next(self) -> None:
        with self._lock:
            if self._running >= _AT_ONCE or not self._waiting:
                return
            self._running += 1
            job = self._waiting.popleft()
        for member in job.names:
            context = trace.set_span_in_context(job.span)
            self._members.fetch_member(member, _MemberSink(member, job), context)

    def _ended(self) -> None:
        """A job that was started is over."""
        with self._lock:
            self._running -= 1
        self._start_next()

    def cancel(self, digest: str) -> None:
        """A composition goes on to its end; its sink refuses what nobody waits for."""
        with self._lock:
            known = digest in self._known
        if not known:
            self._members.cancel(digest)

    def span_of(self, digest: str) -> SpanContext | None:
        """The span of the digest's last fetch, for those who shared it."""
        with self._lock:
            found = self._spans.get(digest)
        return found or self._members.span_of(digest)

    def stop(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def _remember(known: OrderedDict[str, _Value], digest: str, value: _Value) -> None:
    known[digest] = value
    known.move_to_end(digest)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


@dataclass(slots=True)
class _Job:
    """One composition on its way. `names` are its members; `on_end` is called once, when it is over."""

    composition: Composition
    sink: AdapterSink
    span: Span
    names: tuple[str, ...]
    submit: Callable[[Callable[[], None]], object]
    on_end: Callable[[], None]
    members: dict[str, Member] = field(default_factory=dict)
    room: int = MAX_COMPOSED_BYTES
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self, size_bytes: int) -> None:
        """Counts a member's bytes; raises MeshError RESOURCE_EXHAUSTED if all would be too many."""
        with self.lock:
            self.room -= size_bytes
            if self.room < 0:
                raise MeshError(
                    Code.RESOURCE_EXHAUSTED,
                    Reason.OVERLOADED,
                    f"the members of the composition have more than {MAX_COMPOSED_BYTES} bytes",
                )

    def arrived(self, digest: str, member: Member) -> None:
        with self.lock:
            if self.ended:
                return
            self.members[digest] = member
            if len(self.members) < len(self.names):
                return
        self.submit(self._compose)

    def fail(self, error: MeshError) -> None:
        with self.lock:
            if self.ended:
                return
            self.ended = True
            self.members.clear()
        self.span.set_attribute("error.type", error.reason.value)
        self.span.set_status(StatusCode.ERROR, error.message[:256])
        self.span.end()
        try:
            self.sink.fail(error)
        finally:
            self.on_end()

    def _compose(self) -> None:
        try:
            composed = compose(self.composition, self.members)
            self.sink.begin(composed.manifest.to_bytes())
            data = composed.data.data
            for start in range(0, len(data), _PIECE_BYTES):
                self.sink.write(data[start : start + _PIECE_BYTES])
            self.sink.finish()
        except MeshError as error:
            # A sink that raised has ended by itself and ignores this.
            self._fail_quietly(error)
        except Exception as failure:  # the top of a task: the sink must hear of every end
            log.error("composing failed unexpectedly", exc_info=failure)
            self._fail_quietly(MeshError(Code.INTERNAL, Reason.INTERNAL, "the composition failed"))
        else:
            with self.lock:
                self.ended = True
                self.members.clear()
            self.span.set_attribute("adaptermesh.adapter.bytes", len(data))
            self.span.end()
            self.on_end()

    def _fail_quietly(self, error: MeshError) -> None:
        try:
            self.fail(error)
        except MeshError:
            log.debug("the sink had ended", extra={"reason": error.message})


class _MemberSink:
    """Takes one member into memory; used by one thread at a time."""

    def __init__(self, digest: str, job: _Job) -> None:
        self._digest = digest
        self._job = job
        self._manifest: Manifest | None = None
        self._data = bytearray()

    def begin(self, manifest: bytes) -> None:
        try:
            if digest_bytes(manifest) != self._digest:
                raise corrupt(self._digest, "the manifest has another digest")
            self._manifest = Manifest.from_bytes(manifest)
            self._job.claim(self._manifest.size_bytes)
        except MeshError as error:
            self._job.fail(error)
            raise

    def write(self, data: bytes | memoryview) -> None:
        if self._manifest is None or len(self._data) + len(data) > self._manifest.size_bytes:
            error = corrupt(self._digest, "it has more bytes than its manifest says")
            self._job.fail(error)
            raise error
        self._data += data

    def finish(self) -> None:
        try:
            if self._manifest is None:
                raise corrupt(self._digest, "it has no manifest")
            verify_file(self._manifest, self._data)
        except MeshError as error:
            self._job.fail(error)
            raise
        self._job.arrived(self._digest, Member(self._manifest, self._data))

    def fail(self, error: MeshError) -> None:
        self._job.fail(error)
