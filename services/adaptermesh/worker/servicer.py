"""The worker's gRPC face: messages in, nouns inside, messages out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from opentelemetry import context as otel_context

from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.core.errors import MeshError, Reason, unavailable
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.deadline import bounded, time_remaining
from adaptermesh.worker.backend import Backend
from adaptermesh.worker.control import evict_adapter, load_adapter, unpin_adapter
from adaptermesh.worker.engine.request import Outcome
from adaptermesh.worker.generation import Generation, Generations
from adaptermesh.worker.residency import StatusBoard
from adaptermesh.worker.wire import (
    choice_finished_message,
    delta_messages,
    finished_message,
    generation_request,
    prompt_messages,
    residency_message,
    started_message,
    status_message,
    wanted_tier,
)

_LOADING_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What exists once the base model is loaded."""

    info: worker_pb2.WorkerInfo
    backend: Backend
    board: StatusBoard
    generations: Generations
    load_seconds: float
    """Longest time that a LoadAdapter call may take."""


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Refuses every call with UNAVAILABLE until `serve` was called."""

    def __init__(self) -> None:
        self._serving: Serving | None = None

    def serve(self, serving: Serving) -> None:
        """From now on calls are answered."""
        self._serving = serving

    async def Generate(  # noqa: N802
        self, request: worker_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[worker_pb2.GenerateResponse]:
        serving = self._ready()
        remaining = time_remaining(context)
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        generation = await serving.generations.admit(
            generation_request(request), otel_context.get_current(), remaining
        )
        # A call that ends while its output waits to be sent never comes back into this generator.
        context.add_done_callback(lambda _: serving.generations.close(generation))
        try:
            await context.send_initial_metadata(_initial_metadata(serving.info.worker_id, generation))
            admission = generation.admission
            yield started_message(serving.info.worker_id, admission.tier, admission.prompt_tokens)
            async for mail in generation.mails(deadline):
                for message in prompt_messages(mail):
                    yield message
                if mail.token_ids or mail.text:
                    for message in delta_messages(mail):
                        yield message
                if isinstance(mail.end, Outcome) and generation.request.n > 1:
                    yield choice_finished_message(mail.index, mail.end)
            outcome = generation.outcome()
            serving.generations.finished(generation, outcome)
            yield finished_message(outcome)
        except MeshError as error:
            error.metadata.setdefault("request_id", request.request_id)
            serving.generations.failed(generation, error)
            raise
        finally:
            serving.generations.close(generation)

    async def GetStatus(  # noqa: N802
        self,
        request: worker_pb2.GetStatusRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> worker_pb2.GetStatusResponse:
        serving = self._ready()
        return status_message(serving.info, serving.board.snapshot())

    async def LoadAdapter(  # noqa: N802
        self, request: worker_pb2.LoadAdapterRequest, context: Any
    ) -> worker_pb2.LoadAdapterResponse:
        serving = self._ready()
        view = await load_adapter(
            serving.backend,
            request.digest,
            wanted_tier(request.tier),
            request.pin,
            otel_context.get_current(),
            bounded(time_remaining(context), serving.load_seconds),
        )
        return worker_pb2.LoadAdapterResponse(residency=residency_message(view))

    async def UnpinAdapter(  # noqa: N802
        self,
        request: worker_pb2.UnpinAdapterRequest,
        context: Any,  # noqa: ARG002
    ) -> worker_pb2.UnpinAdapterResponse:
        view = await unpin_adapter(self._ready().backend, request.digest)
        return worker_pb2.UnpinAdapterResponse(residency=residency_message(view))

    async def EvictAdapter(  # noqa: N802
        self,
        request: worker_pb2.EvictAdapterRequest,
        context: Any,  # noqa: ARG002
    ) -> worker_pb2.EvictAdapterResponse:
        await evict_adapter(self._ready().backend, request.digest)
        return worker_pb2.EvictAdapterResponse()

    def _ready(self) -> Serving:
        if self._serving is None:
            raise unavailable(
                Reason.OVERLOADED, "the worker is still loading its base model", _LOADING_RETRY_SECONDS
            )
        return self._serving


def _initial_metadata(worker_id: str, generation: Generation) -> tuple[tuple[str, str], ...]:
    request = generation.request
    tier = generation.admission.tier
    pairs = (
        (names.REQUEST_ID, request.request_id),
        (names.WORKER_ID, worker_id),
        (names.ADAPTER_VERSION, request.adapter_version or ("" if request.adapter_digest else "base")),
        (names.ADAPTER_DIGEST, request.adapter_digest),
        (names.ADAPTER_TIER, tier.name.lower() if tier else ""),
    )
    return tuple((key, value) for key, value in pairs if value and value.isascii() and value.isprintable())
