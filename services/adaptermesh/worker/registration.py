"""Makes the worker's base model known to the store, and keeps it known."""

import asyncio
import logging

import grpc
import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.errors import Reason
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.worker.wire import base_model_message

log = logging.getLogger(__name__)

_CALL_SECONDS = 5.0
_MAX_BACKOFF_SECONDS = 5.0


async def register_within(channel: grpc.aio.Channel, base: BaseFacts, seconds: float) -> bool:
    """Registers, giving a store that is away `seconds` to come back. Whether it knows the base model now.

    Whoever sees the worker serve may upload an adapter for its base at once.
    """
    try:
        async with asyncio.timeout(seconds):
            await _register(channel, base)
    except TimeoutError:
        return False
    return True


async def keep_registered(
    channel: grpc.aio.Channel, base: BaseFacts, *, again_seconds: float = 30.0, backoff_seconds: float = 0.2
) -> None:
    """Registers until cancelled: at once, soon again while the store is away, seldom when it knows.

    A store that was set up anew would otherwise not learn of a base model that is being served.
    """
    while True:
        await _register(channel, base, backoff_seconds)
        await asyncio.sleep(again_seconds)


async def _register(channel: grpc.aio.Channel, base: BaseFacts, delay: float = 0.2) -> None:
    """Registers; tries again, ever more slowly, until the store answers."""
    stub = store_pb2_grpc.StoreServiceStub(channel)
    request = store_pb2.RegisterBaseModelRequest(base_model=base_model_message(base))
    while True:
        try:
            response = await stub.RegisterBaseModel(request, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as failure:
            error = mesh_error_from(failure, Reason.STORE_UNREACHABLE)
            log.warning("base model not registered", extra={"reason": error.message, "retry_seconds": delay})
            await asyncio.sleep(delay)
            delay = min(delay * 2, _MAX_BACKOFF_SECONDS)
            continue
        if response.created:
            log.info("base model registered", extra={"base_digest": base.digest, "base_model": base.model_id})
        return
