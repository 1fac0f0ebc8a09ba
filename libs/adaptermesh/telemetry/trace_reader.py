"""Reads traces back from the files that `trace_file` writes."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.core.errors import Code, MeshError, Reason, not_found


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span. Times are nanoseconds since the epoch; ids are lower-case hex, "" for no parent."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    instance: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    status: str
    status_message: str


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One trace in a list."""

    trace_id: str
    root_name: str
    start_ns: int
    duration_ns: int
    services: tuple[str, ...]
    span_count: int
    error: bool
    attributes: dict[str, Any]


def list_traces(directory: Path, limit: int = 20) -> list[TraceSummary]:
    """The newest traces first."""
    traces: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in _read(directory):
        traces[span.trace_id].append(span)
    summaries = [_summary(spans) for spans in traces.values()]
    summaries.sort(key=lambda summary: summary.start_ns, reverse=True)
    return summaries[:limit]


def load_trace(directory: Path, trace_id_prefix: str) -> list[SpanRecord]:
    """All spans of one trace, by start time, with those they link to (a fetch shared with another trace).

    Raises:
        MeshError: NOT_FOUND no such trace; INVALID_ARGUMENT the prefix fits several.
    """
    prefix = trace_id_prefix.lower()
    spans = list(_read(directory))
    ids = {span.trace_id for span in spans if span.trace_id.startswith(prefix)}
    if not prefix or not ids:
        raise not_found(Reason.FILE_NOT_FOUND, "trace", trace_id_prefix)
    if len(ids) > 1:
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.INVALID_FIELD,
            f"trace id '{trace_id_prefix}' fits {len(ids)} traces; give more digits",
            metadata={"field": "trace_id"},
        )
    trace_id = ids.pop()
    own = [span for span in spans if span.trace_id == trace_id]
    linked = {link for span in own for link in span.links}
    others = [s for s in spans if s.trace_id != trace_id and (s.trace_id, s.span_id) in linked]
    return sorted(own + others, key=lambda span: (span.start_ns, -span.end_ns))


def _summary(spans: list[SpanRecord]) -> TraceSummary:
    ids = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in ids]
    root = min(roots or spans, key=lambda span: span.start_ns)
    start = min(span.start_ns for span in spans)
    return TraceSummary(
        trace_id=root.trace_id,
        root_name=root.name,
        start_ns=start,
        duration_ns=max(span.end_ns for span in spans) - start,
        services=tuple(sorted({span.service for span in spans})),
        span_count=len(spans),
        error=any(span.status == "error" for span in spans),
        attributes=_request_attributes(spans, root),
    )


def _request_attributes(spans: list[SpanRecord], root: SpanRecord) -> dict[str, Any]:
    """What the request was about: the gateway's span knows it, the root may be an RPC span of the caller."""
    gateway = next((span for span in spans if span.name == "gateway.request"), root)
    return gateway.attributes


def _read(directory: Path) -> Iterator[SpanRecord]:
    if not directory.is_dir():
        return
    for path in sorted([*directory.glob("*.jsonl"), *directory.glob("*.jsonl.1")]):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                span = _parse(line)
                if span is not None:
                    yield span


def _parse(line: str) -> SpanRecord | None:
    """A span, or None for a line that a crash cut short."""
    try:
        fields = json.loads(line)
        fields["links"] = tuple((str(trace), str(span)) for trace, span in fields["links"])
        return SpanRecord(**fields)
    except (ValueError, TypeError, KeyError):
        return None
