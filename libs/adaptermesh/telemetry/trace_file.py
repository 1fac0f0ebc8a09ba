"""Finished spans in a local file, one JSON object a line: traces without a collector.

A line is written whole with one append, so readers of a live file see complete spans only. Files are cut at
`max_bytes`; the older half is kept beside the new one as `<name>.1`.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

_STATUS = {StatusCode.UNSET: "unset", StatusCode.OK: "ok", StatusCode.ERROR: "error"}


class FileSpanExporter(SpanExporter):
    """Appends spans to `<directory>/<service>-<instance>.jsonl`."""

    def __init__(self, directory: Path, service: str, instance: str, max_bytes: int = 64 * 2**20) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{service}-{instance}.jsonl"
        self._service = service
        self._instance = instance
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = "".join(json.dumps(self._record(span), default=str) + "\n" for span in spans).encode()
        try:
            with self._lock:
                self._append(lines)
        except OSError:
            # A full disk must not take the service down; the exporter's contract is to say so.
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held open."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:  # noqa: ARG002
        return True

    def _append(self, lines: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(descriptor, lines)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size > self._max_bytes:
            self._path.replace(self._path.with_name(self._path.name + ".1"))

    def _record(self, span: ReadableSpan) -> dict[str, Any]:
        context = span.get_span_context()
        assert context is not None  # noqa: S101  # a finished span always has one
        return {
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}",
            "parent_id": f"{span.parent.span_id:016x}" if span.parent else "",
            "name": span.name,
            "kind": span.kind.name.lower(),
            "service": self._service,
            "instance": self._instance,
            "start_ns": span.start_time,
            "end_ns": span.end_time,
            "attributes": dict(span.attributes or {}),
            "links": [[f"{x.context.trace_id:032x}", f"{x.context.span_id:016x}"] for x in span.links],
            "status": _STATUS[span.status.status_code],
            "status_message": span.status.description or "",
        }
