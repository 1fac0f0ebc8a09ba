"""`MeshError` to gRPC status and back: `google.rpc.Status` with one `ErrorInfo`; `RetryInfo` if transient."""

from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from adaptermesh.core.errors import ERROR_DOMAIN, Code, MeshError, Reason

DETAILS_KEY = "grpc-status-details-bin"
_MAX_MESSAGE = 4096
_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}
_PLAIN_REASONS = {
    Code.CANCELLED: Reason.CANCELLED,
    Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    Code.RESOURCE_EXHAUSTED: Reason.OVERLOADED,
}


def grpc_code(error: MeshError) -> grpc.StatusCode:
    return _GRPC_CODES[int(error.code)]


def to_status(error: MeshError) -> status_pb2.Status:
    """The rich status of an error."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason.value, domain=ERROR_DOMAIN, metadata=dict(error.metadata)
    )
    details = [_packed(info)]
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=int(error.code), message=error.message[:_MAX_MESSAGE], details=details)


def from_status(status: status_pb2.Status) -> MeshError:
    """The error that a rich status carries; a status of somebody else gets a fitting reason."""
    code = _code(status.code)
    reason = _PLAIN_REASONS.get(code, Reason.INTERNAL)
    metadata: dict[str, str] = {}
    retry_after: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN and info.reason in Reason.__members__:
            reason = Reason(info.reason)
            metadata = dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return MeshError(code, reason, status.message, metadata=metadata, retry_after=retry_after)


def mesh_error_from(error: grpc.aio.AioRpcError, unreachable: Reason = Reason.WORKER_LOST) -> MeshError:
    """The error behind a failed call.

    Args:
        error: what the call raised.
        unreachable: the reason for an UNAVAILABLE that the transport, not the peer, reported.
    """
    rich = _rich_status(error)
    if rich is not None:
        return from_status(rich)
    code = _code(error.code().value[0])
    message = error.details() or error.code().name
    if code is Code.UNAVAILABLE:
        return MeshError(code, unreachable, message, retry_after=1.0)
    return MeshError(code, _PLAIN_REASONS.get(code, Reason.INTERNAL), message)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: MeshError) -> None:
    """Ends the call with the error's rich status; what trailing metadata was set stays."""
    trailing = [(key, value) for key, value in context.trailing_metadata() or () if key != DETAILS_KEY]
    trailing.append((DETAILS_KEY, to_status(error).SerializeToString()))
    await context.abort(grpc_code(error), error.message[:_MAX_MESSAGE], tuple(trailing))


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    try:
        # An AioRpcError answers code(), details() and trailing_metadata() as a call does.
        found = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        # The details contradict the status line: not ours.
        return None
    return found


def _code(number: int) -> Code:
    return Code(number) if number in Code._value2member_map_ else Code.INTERNAL


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
