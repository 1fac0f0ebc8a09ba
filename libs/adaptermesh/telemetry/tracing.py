"""Tracing: one W3C trace over all services, into a local file and, when configured, to OTLP."""

from collections.abc import Mapping
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import NoOpTracerProvider, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from adaptermesh.telemetry.trace_file import FileSpanExporter

_PROPAGATOR = TraceContextTextMapPropagator()
_FILE_DELAY_MILLIS = 200
_OTLP_DELAY_MILLIS = 1000


class _NameService(SpanProcessor):
    """Puts the service's name on each span: some receivers drop the resource that carries it."""

    def __init__(self, service: str) -> None:
        self._service = service

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        span.set_attribute("service.name", self._service)


class Tracing:
    """One process's tracer and the exporters behind it."""

    def __init__(self, tracer: Tracer, provider: TracerProvider | None = None) -> None:
        self.tracer = tracer
        self._provider = provider

    def flush(self) -> None:
        """Writes out what has ended."""
        if self._provider is not None:
            self._provider.force_flush(2000)

    def shutdown(self) -> None:
        """Writes out what has ended and stops."""
        if self._provider is not None:
            self._provider.shutdown()


def start_tracing(service: str, instance: str, directory: Path | None, otlp_endpoint: str = "") -> Tracing:
    """Starts tracing for a process.

    Args:
        service: the service's short name, e.g. "router".
        instance: distinguishes processes of one service.
        directory: where the local files go; None writes none.
        otlp_endpoint: an OTLP gRPC endpoint such as `http://collector:4317`; empty sends nothing.
    """
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"adaptermesh-{service}", "service.instance.id": instance}),
        shutdown_on_exit=False,
    )
    if directory is not None:
        exporter = FileSpanExporter(directory, service, instance)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=_FILE_DELAY_MILLIS, max_export_batch_size=512)
        )
    if otlp_endpoint:
        provider.add_span_processor(_NameService(f"adaptermesh-{service}"))
        provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=otlp_endpoint, insecure=not otlp_endpoint.startswith("https://")),
                schedule_delay_millis=_OTLP_DELAY_MILLIS,
            )
        )
    return Tracing(provider.get_tracer("adaptermesh"), provider)


def trace_into(exporter: SpanExporter) -> Tracing:
    """Tracing that hands every span to `exporter` at once; for tests."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider.get_tracer("adaptermesh"), provider)


def no_tracing() -> Tracing:
    """Tracing that records nothing."""
    return Tracing(NoOpTracerProvider().get_tracer("adaptermesh"))


def inject(context: Context | None = None) -> list[tuple[str, str]]:
    """`traceparent` and `tracestate` for an outgoing call, from `context` or the current span."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return list(carrier.items())


def extract(metadata: Mapping[str, str]) -> Context:
    """The caller's trace context; an empty one if the headers are absent or malformed."""
    return _PROPAGATOR.extract(metadata, Context())
