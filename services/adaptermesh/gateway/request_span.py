"""The span `gateway.request`: what was asked, what served it, what it took."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.duration_pb2 import Duration
from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import MeshError
from adaptermesh.gateway.placement import Placed
from adaptermesh.gateway.request import GenerateCall
from adaptermesh.telemetry.tracing import Tracing

PROVIDER = "adaptermesh"


def tier_name(tier: adapter_pb2.Tier.ValueType) -> str:
    """`device`, `host`, `disk` or `store`; empty for the bare base model."""
    return "" if not tier else adapter_pb2.Tier.Name(tier).removeprefix("TIER_").lower()


def switch_name(kind: adapter_pb2.SwitchKind.ValueType) -> str:
    """`warm`, `cool` or `cold`; empty for the bare base model."""
    return "" if not kind else adapter_pb2.SwitchKind.Name(kind).removeprefix("SWITCH_KIND_").lower()


class RequestSpan:
    """Fills in one request's span as it goes."""

    def __init__(self, span: Span, clock: Clock, request_id: str) -> None:
        self._span = span
        self._clock = clock
        self._begin = clock.monotonic()
        self._has_output = False
        span.set_attributes({"gen_ai.provider.name": PROVIDER, "adaptermesh.request.id": request_id})

    @property
    def trace_id(self) -> str:
        """The trace's id in hex; empty if nothing is recorded."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else ""

    def asked(self, call: GenerateCall) -> None:
        self._span.set_attributes(
            {
                "gen_ai.operation.name": call.prompt.operation,
                "gen_ai.request.model": call.caller.target.asked,
                "gen_ai.request.max_tokens": call.sampling.max_tokens,
                "gen_ai.request.temperature": call.sampling.temperature,
                "adaptermesh.tenant.id": call.caller.tenant,
            }
        )

    def placed(self, placed: Placed, call: GenerateCall) -> None:
        decision, started = placed.decision, placed.started
        attributes: dict[str, str | int | list[str]] = {
            "gen_ai.response.model": decision.adapter_version,
            "adaptermesh.adapter.ref": decision.ref,
            "adaptermesh.adapter.version": decision.adapter_version,
            "adaptermesh.worker.id": decision.worker_id,
            "adaptermesh.gateway.attempts": placed.attempts,
        }
        if decision.adapter_digest:
            attributes["adaptermesh.adapter.digest"] = decision.adapter_digest
            attributes["adaptermesh.adapter.op_kinds"] = list(decision.op_kinds)
            attributes["adaptermesh.adapter.bytes"] = decision.size_bytes
            attributes["adaptermesh.switch.kind"] = switch_name(started.switch_kind)
            attributes["adaptermesh.switch.tier"] = tier_name(started.tier)
        if call.caller.target.task:
            attributes["adaptermesh.route.name"] = call.caller.target.task
            attributes["adaptermesh.route.generation"] = decision.route_generation
            attributes["adaptermesh.route.cohort"] = decision.cohort
        self._span.set_attributes(attributes)

    def output(self) -> None:
        """Something was generated and handed on."""
        if not self._has_output:
            self._has_output = True
            elapsed = self._clock.monotonic() - self._begin
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", elapsed)

    def finished(self, finished: inference_pb2.GenerateFinished) -> None:
        reason = (
            inference_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
        )
        timings = finished.timings
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": finished.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": finished.cached_tokens,
                "gen_ai.usage.output_tokens": finished.output_tokens,
                "gen_ai.response.finish_reasons": [reason],
                "adaptermesh.switch.shared_fetch": timings.shared_fetch,
            }
        )
        for step in ("queue", "fetch", "verify", "h2d"):
            if timings.HasField(step):
                self._span.set_attribute(
                    f"adaptermesh.switch.{step}_ms", _milliseconds(getattr(timings, step))
                )

    def failed(self, error: BaseException) -> None:
        if isinstance(error, MeshError):
            self._span.set_attribute("error.type", error.reason.value)
            self._span.set_status(StatusCode.ERROR, error.message[:256])
            if "worker_id" in error.metadata:
                self._span.set_attribute("adaptermesh.worker.id", error.metadata["worker_id"])
            return
        cancelled = isinstance(error, asyncio.CancelledError)
        self._span.set_attribute("error.type", "CANCELLED" if cancelled else type(error).__qualname__)
        self._span.set_status(StatusCode.ERROR, "the client went away" if cancelled else "internal error")


@contextmanager
def request_span(tracing: Tracing, clock: Clock, request_id: str) -> Iterator[RequestSpan]:
    """The request's span, current while the block runs, so that outgoing calls belong to it."""
    with tracing.tracer.start_as_current_span(
        "gateway.request", record_exception=False, set_status_on_exception=False
    ) as span:
        record = RequestSpan(span, clock, request_id)
        try:
            yield record
        except BaseException as error:
            record.failed(error)
            raise


def _milliseconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e6
