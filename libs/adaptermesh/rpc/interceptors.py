"""What happens around every call that a service answers: the trace is joined, errors become statuses."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.payloads import serializer
from adaptermesh.rpc.status import abort
from adaptermesh.telemetry.tracing import Tracing, extract

log = logging.getLogger(__name__)

_OWN = "/adaptermesh."


class Gate(Protocol):
    """Decides whether a call may go on."""

    async def admit(self, method: str, metadata: Mapping[str, str], request: Any) -> None:
        """Returns if it may, in the context in which the call goes on; raises MeshError if not.

        Args:
            method: `<package>.<service>/<name>`.
            metadata: what came with the call.
            request: the message; None if the caller streams them.
        """
        ...


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Joins the caller's trace and turns `MeshError` into a rich status, for the mesh's own services.

    A servicer may give a message as `encode_payload` made it. With a `gate`, every call passes there first.
    """

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self.gate: Gate | None = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OWN):
            return handler
        method = handler_call_details.method.lstrip("/")
        wrap = _WRAPPERS[handler.request_streaming, handler.response_streaming]
        return wrap(self, method, handler)

    async def admit(self, method: str, request: Any, context: Any, *, streams: bool) -> None:
        """Raises MeshError if the gate refuses the call."""
        if self.gate is not None:
            await self.gate.admit(method, names.read(context), None if streams else request)

    @contextmanager
    def span(self, method: str, context: Any) -> Iterator[Span | None]:
        """A server span if the caller sent a trace context.

        Without one there is none: health polls and the long-lived streams between the services would
        otherwise each be a trace of their own.
        """
        parent = extract(names.read(context))
        if not trace.get_current_span(parent).get_span_context().is_valid:
            yield None
            return
        span = self._tracing.tracer.start_span(
            method,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
        )
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield span

    async def fail(self, error: BaseException, method: str, context: Any, span: Span | None) -> None:
        """Ends the call with the status that an error stands for; re-raises what is not ours to end."""
        if isinstance(error, asyncio.CancelledError | grpc.aio.AbortError):
            _mark(span, "CANCELLED" if isinstance(error, asyncio.CancelledError) else "ABORTED", str(error))
            raise error
        if isinstance(error, grpc.aio.InternalError):
            # gRPC's word for a write to a call that has ended.
            _mark(span, "CANCELLED", "the client went away")
            return
        if not isinstance(error, MeshError):
            log.error("call failed unexpectedly", extra={"method": method}, exc_info=error)
            error = MeshError(
                Code.INTERNAL, Reason.INTERNAL, "internal error; the service's log has the cause"
            )
        request_id = names.read(context).get(names.REQUEST_ID, "")
        if request_id:
            error.metadata.setdefault("request_id", request_id)
        _mark(span, error.code.name, error.message)
        try:
            await abort(context, error)
        except grpc.aio.InternalError:
            # The call has ended already: nobody is left to be told.
            log.info("caller left before its error", extra={"method": method, "reason": error.reason.value})


def _mark(span: Span | None, code: str, message: str) -> None:
    if span is not None:
        span.set_attribute("rpc.status_code", code)
        span.set_status(StatusCode.ERROR, message[:256])


def _ok(span: Span | None) -> None:
    if span is not None:
        span.set_attribute("rpc.status_code", "OK")


def _unary_response(interceptor: ServerInterceptor, method: str, behaviour: Any, *, streams: bool) -> Any:
    async def call(request: Any, context: Any) -> Any:
        with interceptor.span(method, context) as span:
            try:
                await interceptor.admit(method, request, context, streams=streams)
                response = await behaviour(request, context)
                _ok(span)
                return response
            except BaseException as error:  # noqa: BLE001  # the top of every call
                await interceptor.fail(error, method, context, span)

    return call


def _stream_response(interceptor: ServerInterceptor, method: str, behaviour: Any, *, streams: bool) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        with interceptor.span(method, context) as span:
            try:
                await interceptor.admit(method, request, context, streams=streams)
                # A call that is cancelled at a yield must not leave the inner generator to the collector.
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
                _ok(span)
            except GeneratorExit:
                _mark(span, "CANCELLED", "the client went away")
                raise
            except BaseException as error:  # noqa: BLE001  # the top of every call
                await interceptor.fail(error, method, context, span)

    return call


def _wrap(
    kind: str, build: Callable[..., Any], make_handler: Callable[..., Any]
) -> Callable[[ServerInterceptor, str, Any], Any]:
    def wrap(interceptor: ServerInterceptor, method: str, handler: Any) -> Any:
        streams = bool(handler.request_streaming)
        behaviour = build(interceptor, method, getattr(handler, kind), streams=streams)
        return make_handler(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=serializer(handler.response_serializer),
        )

    return wrap


_WRAPPERS = {
    (False, False): _wrap("unary_unary", _unary_response, grpc.unary_unary_rpc_method_handler),
    (False, True): _wrap("unary_stream", _stream_response, grpc.unary_stream_rpc_method_handler),
    (True, False): _wrap("stream_unary", _unary_response, grpc.stream_unary_rpc_method_handler),
    (True, True): _wrap("stream_stream", _stream_response, grpc.stream_stream_rpc_method_handler),
}
