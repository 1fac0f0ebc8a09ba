"""The public API over gRPC: from messages to requests and back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc.aio

from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.gateway.authentication import Authentication
from adaptermesh.gateway.deadline import Deadline, deadline_exceeded
from adaptermesh.gateway.gate import Gate
from adaptermesh.gateway.models import Model, ModelList
from adaptermesh.gateway.placement import Placed, Placement
from adaptermesh.gateway.request import Caller
from adaptermesh.gateway.request_span import RequestSpan, request_span, tier_name
from adaptermesh.gateway.validation import is_request_id, read_caller, read_generate
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.deadline import time_remaining
from adaptermesh.telemetry.tracing import Tracing

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@dataclass(frozen=True, slots=True)
class Edge:
    """What the servicer needs besides the routes to its peers."""

    gate: Gate
    authentication: Authentication
    tracing: Tracing
    clock: Clock
    new_request_id: Callable[[], str]
    default_deadline_seconds: float


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`adaptermesh.api.inference.v1.InferenceService`."""

    def __init__(self, placement: Placement, models: ModelList, edge: Edge) -> None:
        self._placement = placement
        self._models = models
        self._edge = edge

    async def Generate(  # noqa: N802  # the proto's name
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        # Writes through the context and never yields: at a yield a cancelled call would leave the worker's
        # stream to the garbage collector, and the deadline could not end a write to a client that has stopped
        # reading.
        request_id = self._request_id(context)
        with request_span(self._edge.tracing, self._edge.clock, request_id) as span:
            _announce(context, request_id, span.trace_id)
            with _owned(request_id), self._edge.gate.enter():
                await self._generate(request, context, request_id, span)
        return
        yield

    async def ListModels(  # noqa: N802  # the proto's name
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        request_id = self._request_id(context)
        _announce(context, request_id, "")
        with _owned(request_id), self._edge.gate.enter():
            metadata = names.read(context)
            caller = await self._caller(metadata, request_id)
            deadline = self._deadline(context)
            shown = metadata[names.AUTHORIZATION] if caller.identity else ""
            page = await self._models.page(request.page_size, request.page_token, deadline, shown)
        await context.send_initial_metadata(((names.REQUEST_ID, request_id),))
        return inference_pb2.ListModelsResponse(
            models=[_to_wire(model) for model in page.models], next_page_token=page.next_page_token
        )

    async def _generate(
        self, request: inference_pb2.GenerateRequest, context: Context, request_id: str, span: RequestSpan
    ) -> None:
        call = read_generate(request, await self._caller(names.read(context), request_id))
        span.asked(call)
        deadline = self._deadline(context)
        try:
            async with asyncio.timeout(deadline.remaining()):
                placed = await self._placement.place(call, deadline)
                try:
                    span.placed(placed, call)
                    await self._forward(placed, context, request_id, span)
                finally:
                    await placed.stream.close()
        except TimeoutError:
            raise deadline_exceeded() from None

    async def _forward(self, placed: Placed, context: Context, request_id: str, span: RequestSpan) -> None:
        """Hands on each event when the client has room for it, and only then reads the next one."""
        with _client_gone_is_cancelled():
            await context.send_initial_metadata(_response_metadata(placed, request_id, span.trace_id))
            await context.write(_started(placed, request_id))
            async for event in placed.stream.events():
                if isinstance(event, inference_pb2.GenerateDelta):
                    await context.write(inference_pb2.GenerateResponse(delta=event))
                    span.output()
                elif isinstance(event, inference_pb2.PromptLogprobs):
                    await context.write(inference_pb2.GenerateResponse(prompt_logprobs=event))
                elif isinstance(event, inference_pb2.ChoiceFinished):
                    await context.write(inference_pb2.GenerateResponse(choice_finished=event))
                else:
                    span.finished(event)
                    await context.write(inference_pb2.GenerateResponse(finished=event))

    async def _caller(self, metadata: Mapping[str, str], request_id: str) -> Caller:
        identity = await self._edge.authentication.identity(metadata)
        return read_caller(metadata, request_id, identity)

    def _request_id(self, context: Context) -> str:
        given = names.read(context).get(names.REQUEST_ID, "")
        return given if is_request_id(given) else self._edge.new_request_id()

    def _deadline(self, context: Context) -> Deadline:
        remaining = time_remaining(context)
        return Deadline.after(self._edge.default_deadline_seconds if remaining is None else remaining)


@contextmanager
def _client_gone_is_cancelled() -> Iterator[None]:
    """A write may find the call ended before the cancellation of its task has arrived."""
    try:
        yield
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError("the client went away") from error


@contextmanager
def _owned(request_id: str) -> Iterator[None]:
    """Every error that leaves the block names the request."""
    try:
        yield
    except MeshError as error:
        error.metadata["request_id"] = request_id
        raise
    except Exception as error:
        log.exception("request failed unexpectedly", extra={"request_id": request_id})
        raise MeshError(
            Code.INTERNAL,
            Reason.INTERNAL,
            "internal error; the gateway's log has the cause",
            metadata={"request_id": request_id},
        ) from error


def _announce(context: Context, request_id: str, trace_id: str) -> None:
    """An error goes out without initial metadata, so the ids are in the trailing one too."""
    context.set_trailing_metadata(_ids(request_id, trace_id))


def _ids(request_id: str, trace_id: str) -> tuple[tuple[str, str], ...]:
    ids = ((names.REQUEST_ID, request_id),)
    return (*ids, (names.TRACE_ID, trace_id)) if trace_id else ids


def _response_metadata(placed: Placed, request_id: str, trace_id: str) -> tuple[tuple[str, str], ...]:
    decision = placed.decision
    return (
        *_ids(request_id, trace_id),
        (names.ADAPTER_VERSION, decision.adapter_version),
        (names.ADAPTER_DIGEST, decision.adapter_digest),
        (names.ADAPTER_TIER, tier_name(placed.started.tier)),
        # Free text: what a header can't hold is percent-encoded.
        (names.COHORT, quote(decision.cohort, safe=_PRINTABLE)),
        (names.WORKER_ID, decision.worker_id),
        (names.ROUTE_GENERATION, str(decision.route_generation)),
    )


def _started(placed: Placed, request_id: str) -> inference_pb2.GenerateResponse:
    decision, started = placed.decision, placed.started
    return inference_pb2.GenerateResponse(
        started=inference_pb2.GenerateStarted(
            request_id=request_id,
            adapter_version=decision.adapter_version,
            adapter_digest=decision.adapter_digest,
            base_digest=decision.base_digest,
            ref=decision.ref,
            cohort=decision.cohort,
            route_generation=decision.route_generation,
            worker_id=decision.worker_id,
            tier=started.tier,
            switch_kind=started.switch_kind,
            prompt_tokens=started.prompt_tokens,
            warnings=decision.warnings,
        )
    )


def _to_wire(model: Model) -> inference_pb2.Model:
    return inference_pb2.Model(
        id=model.id,
        digest=model.digest,
        base_model_id=model.base_model_id,
        task=model.task,
        aliases=model.aliases,
    )
