"""One call to a worker: opened, checked against the router's decision, read message by message."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.gateway.channels import Connection, WorkerChannels
from adaptermesh.gateway.deadline import Deadline
from adaptermesh.gateway.dispatch import Decision
from adaptermesh.gateway.request import GenerateCall
from adaptermesh.rpc.sampling import sampling_message
from adaptermesh.rpc.status import mesh_error_from

RETRY_AFTER_SECONDS = 1.0
_END_SECONDS = 5.0

Event = (
    inference_pb2.PromptLogprobs
    | inference_pb2.GenerateDelta
    | inference_pb2.ChoiceFinished
    | inference_pb2.GenerateFinished
)


class WorkerStream:
    """A request on a worker. Nothing is read ahead: the worker is held back by a client that reads slowly."""

    def __init__(
        self, channels: WorkerChannels, connection: Connection, call: Any, decision: Decision
    ) -> None:
        self.decision = decision
        self._channels = channels
        self._connection = connection
        self._call = call
        self._lost = False

    @classmethod
    async def open(
        cls, channels: WorkerChannels, call: GenerateCall, decision: Decision, deadline: Deadline
    ) -> "WorkerStream":
        """Sends the request to the worker that the router chose. The stream must be closed."""
        timeout = deadline.remaining()
        connection = await channels.acquire(decision.worker_address)
        stub = worker_pb2_grpc.WorkerServiceStub(connection.channel)
        return cls(
            channels, connection, stub.Generate(to_worker_request(call, decision), timeout=timeout), decision
        )

    async def started(self, deadline: Deadline, admission_timeout: float) -> worker_pb2.GenerateStarted:
        """Waits until the worker has admitted the request.

        Raises:
            MeshError: the worker's refusal; UNAVAILABLE (WORKER_LOST) if it can't be reached, does not answer
                or is not the one that was chosen.
        """
        try:
            async with asyncio.timeout(deadline.remaining(admission_timeout)):
                response = await self._read()
        except TimeoutError:
            deadline.remaining()
            raise self._loss("the worker did not answer in time") from None
        if response is None:
            raise self._loss("the worker's stream ended before it started")
        if response.WhichOneof("event") != "started":
            raise self._violation("the worker's first message is not 'started'")
        self._check(response.started)
        return response.started

    async def events(self) -> AsyncIterator[Event]:
        """What follows `started`, up to and including `finished`.

        Raises:
            MeshError: the worker's error; UNAVAILABLE (WORKER_LOST) if the stream ends without `finished`.
        """
        while (response := await self._read()) is not None:
            match response.WhichOneof("event"):
                case "prompt_logprobs":
                    yield response.prompt_logprobs
                case "delta":
                    yield response.delta
                case "choice_finished":
                    yield response.choice_finished
                case "finished":
                    yield response.finished
                    await self._end()
                    return
                case _:
                    raise self._violation("the worker sent something that does not follow 'started'")
        raise self._loss("the worker's stream ended without saying how")

    async def close(self) -> None:
        """Cancels what still runs and gives the connection back."""
        self._call.cancel()
        await self._channels.release(self._connection, failed=self._lost)

    async def _read(self) -> worker_pb2.GenerateResponse | None:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        return None if response is grpc.aio.EOF else response

    async def _end(self) -> None:
        """Lets the worker end its call by itself, so that it does not look cancelled there."""
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._call.read()
        except (grpc.aio.AioRpcError, TimeoutError):
            # The client has the whole answer; how the call ends no longer matters to it.
            return

    def _failure(self, error: grpc.aio.AioRpcError) -> MeshError:
        found = mesh_error_from(error, Reason.WORKER_LOST)
        if found.reason is Reason.WORKER_LOST or found.reason is Reason.CANCELLED:
            # Nobody here cancelled: a server that is stopped ends its calls so.
            return self._loss(found.message)
        found.metadata.setdefault("worker_id", self.decision.worker_id)
        return found

    def _loss(self, why: str) -> MeshError:
        self._lost = True
        worker_id = self.decision.worker_id
        return unavailable(
            Reason.WORKER_LOST,
            f"worker '{worker_id}' is lost: {why}",
            RETRY_AFTER_SECONDS,
            worker_id=worker_id,
        )

    def _violation(self, message: str) -> MeshError:
        about = {"worker_id": self.decision.worker_id}
        return MeshError(Code.INTERNAL, Reason.INTERNAL, message, metadata=about)

    def _check(self, started: worker_pb2.GenerateStarted) -> None:
        """Another process may have taken over the address; a base answer must never pass for an adapter's."""
        if started.worker_id != self.decision.worker_id:
            raise self._loss(f"'{started.worker_id}' answers at its address")
        has_tier = started.tier != adapter_pb2.TIER_UNSPECIFIED
        if has_tier != bool(self.decision.adapter_digest):
            served = "an adapter" if has_tier else "the base model"
            raise self._violation(f"the worker serves {served}, not {self.decision.adapter_version}")


def to_worker_request(call: GenerateCall, decision: Decision) -> worker_pb2.GenerateRequest:
    """The request as the worker takes it: by digest, every sampling value spelt out."""
    prompt = call.prompt
    request = worker_pb2.GenerateRequest(
        request_id=call.caller.request_id,
        tenant=call.caller.tenant,
        adapter_digest=decision.adapter_digest,
        base_digest=decision.base_digest,
        adapter_version=decision.adapter_version,
        sampling=sampling_message(call.sampling),
        priority=call.priority,
        n=call.n,
        composition=decision.composition,
    )
    if prompt.chat is not None:
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in prompt.chat
        )
    elif prompt.token_ids is not None:
        request.token_ids.ids.extend(prompt.token_ids)
    else:
        request.text = prompt.text or ""
    return request
