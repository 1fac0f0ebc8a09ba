"""Channels: how one service calls another."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from opentelemetry import trace

from adaptermesh.rpc import metadata as names
from adaptermesh.telemetry.tracing import inject

MAX_MESSAGE_BYTES = 4 * 2**20

# Reads may be sent again by gRPC itself; a mutation is repeated only by a caller who knows what that means.
_RETRIED_READS = {
    "adaptermesh.api.store.v1.StoreService": (
        "ResolveRef",
        "ListVersions",
        "ListStatusHistory",
        "ListAdapters",
        "ListAliasHistory",
        "ListSignatures",
        "GetNamespacePolicy",
        "ListRoutes",
        "ListBaseModels",
        "RegisterBaseModel",
        "GetFeedStatus",
        "GetDownloadCounts",
        "SearchAdapters",
        "GetUpload",
    ),
    "adaptermesh.api.access.v1.AccessService": (
        "GetCaller",
        "ListTenants",
        "ListNamespaces",
        "ListApiKeys",
        "ListGrants",
        "ListAuditEntries",
    ),
    # Dispatch is not among them: "no worker" is an answer, and the gateway knows when to ask again.
    "adaptermesh.api.router.v1.RouterService": ("ListWorkers", "GetRouterStatus"),
}

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, methods in _RETRIED_READS.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted peer is found again quickly.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that one attempt to connect may take: an address whose host is gone never answers.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two channels to one address share no state: a dead one must not hold the other back.
    ("grpc.use_local_subchannel_pool", 1),
)


class _Unary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, add: "_Added") -> None:
        self._add = add

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._add.to(client_call_details), request)


class _ServerStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, add: "_Added") -> None:
        self._add = add

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> AsyncIterator[Any] | Any:
        return await continuation(self._add.to(client_call_details), request)


class _ClientStream(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, add: "_Added") -> None:
        self._add = add

    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._add.to(client_call_details), request_iterator)


class _Added:
    """What goes with every call of a channel, unless the call has it already."""

    def __init__(self, api_key: str) -> None:
        self._key = ((names.AUTHORIZATION, f"Bearer {api_key}"),) if api_key else ()

    def to(self, details: Any) -> Any:
        """The call's details with the API key, and with the current span's context if there is one."""
        traced = trace.get_current_span().get_span_context().is_valid
        added = (*self._key, *(inject() if traced else ()))
        if not added:
            return details
        pairs = list(details.metadata or ())
        present = {key for key, _ in pairs}
        pairs += [(key, value) for key, value in added if key not in present]
        return details._replace(metadata=grpc.aio.Metadata(*pairs))


def open_channel(target: str, api_key: str = "") -> grpc.aio.Channel:
    """A channel to `host:port`, or to every address behind a DNS name (round robin).

    The API key, if there is one, and the current span's W3C context travel with every call but those that
    stream in both directions.
    """
    add = _Added(api_key)
    interceptors = (_Unary(add), _ServerStream(add), *((_ClientStream(add),) if api_key else ()))
    return grpc.aio.insecure_channel(target, options=_OPTIONS, interceptors=interceptors)
