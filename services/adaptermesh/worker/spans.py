"""The spans of a request's steps, written after the fact from the engine's timeline."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, StatusCode, Tracer

from adaptermesh.core.errors import MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.worker.engine.request import Outcome, Timeline

_SWITCH = {Tier.DEVICE: "warm", Tier.HOST: "cool", Tier.DISK: "cool", Tier.STORE: "cold"}

Attribute = str | bool | int | float | tuple[str, ...]


@dataclass(slots=True)
class ServedRequest:
    """What the spans say about a request. `context` holds the span of the call that brought it."""

    tenant: str
    adapter_digest: str
    adapter_version: str
    context: Context
    tier: Tier = Tier.NONE
    submitted_ns: int = field(default_factory=time.time_ns)


class RequestSpans:
    """Writes the spans of one worker's requests, as children of the calls' own spans.

    A call that came without a trace gets none: its steps would each be a trace of their own.
    """

    def __init__(
        self, tracer: Tracer, worker_id: str, fetch_span_of: Callable[[str], SpanContext | None]
    ) -> None:
        self._tracer = tracer
        self._worker_id = worker_id
        self._fetch_span_of = fetch_span_of

    def admitted(self, served: ServedRequest, tier: Tier) -> None:
        """Names what serves the call on the call's own span."""
        served.tier = tier
        trace.get_current_span(served.context).set_attributes(self._identity(served))

    def finished(self, served: ServedRequest, outcome: Outcome) -> None:
        if not _traced(served):
            return
        timeline = outcome.timeline
        overlap_ms = timeline.overlapped_ns / 1e6
        self._admit(served, timeline)
        self._span(
            served,
            "adapter.h2d",
            timeline.h2d_start_ns,
            timeline.h2d_end_ns,
            {
                **_adapter(served),
                "adaptermesh.switch.h2d_ms": _ms(timeline.h2d_start_ns, timeline.h2d_end_ns),
            },
        )
        self._span(
            served,
            "engine.prefill",
            timeline.scheduled_ns,
            timeline.first_token_ns,
            {
                **_adapter(served),
                **_input_usage(outcome),
                **({"adaptermesh.switch.overlap_ms": overlap_ms} if overlap_ms else {}),
            },
        )
        self._span(
            served,
            "engine.decode",
            timeline.first_token_ns,
            timeline.finished_ns,
            {
                **_adapter(served),
                "gen_ai.usage.output_tokens": outcome.output_tokens,
                "gen_ai.response.finish_reasons": (outcome.finish_reason.value,),
            },
        )
        trace.get_current_span(served.context).set_attributes(
            {**_input_usage(outcome), "gen_ai.usage.output_tokens": outcome.output_tokens}
        )

    def failed(self, served: ServedRequest, error: MeshError) -> None:
        """A request that ended without an outcome: its admission is all that is known."""
        if not _traced(served):
            return
        span = self._tracer.start_span(
            "worker.admit",
            context=served.context,
            start_time=served.submitted_ns,
            attributes={**self._identity(served), "error.type": error.reason.value},
        )
        span.set_status(StatusCode.ERROR, error.message[:256])
        span.end()

    def _admit(self, served: ServedRequest, timeline: Timeline) -> None:
        fetched = timeline.fetch_start_ns > 0
        attributes: dict[str, Attribute] = {
            **self._identity(served),
            "adaptermesh.switch.queue_ms": _ms(timeline.submitted_ns, timeline.scheduled_ns),
        }
        links: list[Link] = []
        if fetched:
            attributes["adaptermesh.switch.fetch_ms"] = _ms(timeline.fetch_start_ns, timeline.fetch_end_ns)
            attributes["adaptermesh.switch.verify_ms"] = timeline.verify_ns / 1e6
            attributes["adaptermesh.switch.shared_fetch"] = timeline.shared_fetch
            attributes["adaptermesh.adapter.bytes"] = timeline.fetched_bytes
        shared = self._fetch_span_of(served.adapter_digest) if timeline.shared_fetch else None
        if shared is not None:
            links.append(Link(shared))
        self._span(
            served, "worker.admit", timeline.submitted_ns, timeline.scheduled_ns, attributes, tuple(links)
        )

    def _span(
        self,
        served: ServedRequest,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Attribute],
        links: tuple[Link, ...] = (),
    ) -> None:
        """A span of a step; none for a step that did not happen."""
        if start_ns == 0 or end_ns == 0:
            return
        self._tracer.start_span(
            name, context=served.context, start_time=start_ns, attributes=dict(attributes), links=links
        ).end(end_time=end_ns)

    def _identity(self, served: ServedRequest) -> dict[str, Attribute]:
        attributes: dict[str, Attribute] = {
            "adaptermesh.worker.id": self._worker_id,
            "adaptermesh.tenant.id": served.tenant,
            **_adapter(served),
        }
        kind = _SWITCH.get(served.tier)
        if kind is not None:
            attributes["adaptermesh.switch.kind"] = kind
            attributes["adaptermesh.switch.tier"] = served.tier.name.lower()
        return attributes


def _adapter(served: ServedRequest) -> dict[str, Attribute]:
    version = served.adapter_version or ("" if served.adapter_digest else "base")
    found = {"adaptermesh.adapter.digest": served.adapter_digest, "adaptermesh.adapter.version": version}
    return {key: value for key, value in found.items() if value}


def _input_usage(outcome: Outcome) -> dict[str, Attribute]:
    return {
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": outcome.timeline.cached_tokens,
    }


def _traced(served: ServedRequest) -> bool:
    return trace.get_current_span(served.context).get_span_context().is_valid


def _ms(start_ns: int, end_ns: int) -> float:
    return max(0, end_ns - start_ns) / 1e6 if start_ns and end_ns else 0.0
