"""The gateway's client: generate, and see what can be asked for."""

import uuid
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc
from adaptermesh.client import wire
from adaptermesh.client.calls import (
    DEFAULT_GATEWAY,
    PAGE_SIZE,
    Connection,
    Deadlines,
    all_pages,
    call_error,
)
from adaptermesh.client.generation import (
    Ask,
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    Generation,
    Prompt,
    PromptLogprobs,
    Started,
    choice_finished_of,
    choices_of,
    delta_of,
    finished_of,
    prompt_logprobs_of,
    request_of,
    started_of,
)
from adaptermesh.client.mesh_records import Model
from adaptermesh.core.clock import Clock, SystemClock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.rpc import metadata as names

Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class GenerationStream:
    """One answer as it comes: an async iterator of events, first `Started`, last `Finished`.

    It ends with `Finished` or with a `MeshError`, never by silence. Leaving `async with`, or cancel(), frees
    what the request holds on the worker.
    """

    def __init__(self, call: Call, request_id: str, target: str, clock: Clock) -> None:
        self.request_id = request_id
        self._call = call
        self._target = target
        self._clock = clock
        self._sent_at = clock.monotonic()
        self._events = self._read()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the request; nothing happens if it has ended already."""
        self._call.cancel()

    async def collect(self, on_event: Callable[[Event], None] | None = None) -> Generation:
        """Waits for the whole answer; `on_event` sees each event as it comes."""
        started: Started | None = None
        finished: Finished | None = None
        first_token_at: float | None = None
        parts: list[Delta | ChoiceFinished] = []
        prompt_logprobs: list[TokenLogprobs] = []
        async for event in self:
            match event:
                case Started():
                    started = event
                case PromptLogprobs():
                    prompt_logprobs.extend(event.logprobs)
                case Delta():
                    if first_token_at is None:
                        first_token_at = self._clock.monotonic()
                    parts.append(event)
                case ChoiceFinished():
                    parts.append(event)
                case Finished():
                    finished = event
            if on_event is not None:
                on_event(event)
        if started is None or finished is None:
            raise self._broken_off()
        now = self._clock.monotonic()
        return Generation(
            choices=choices_of(parts, finished),
            started=started,
            finished=finished,
            ttft=(now if first_token_at is None else first_token_at) - self._sent_at,
            duration=now - self._sent_at,
            prompt_logprobs=tuple(prompt_logprobs),
        )

    async def _read(self) -> AsyncIterator[Event]:
        ended = False
        try:
            async for message in self._call:
                kind = message.WhichOneof("event")
                if kind == "started":
                    yield started_of(message.started, await self._trace_id())
                elif kind == "prompt_logprobs":
                    yield prompt_logprobs_of(message.prompt_logprobs)
                elif kind == "delta":
                    yield delta_of(message.delta)
                elif kind == "choice_finished":
                    yield choice_finished_of(message.choice_finished)
                elif kind == "finished":
                    ended = True
                    yield finished_of(message.finished)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        if not ended:
            raise self._broken_off()

    async def _trace_id(self) -> str:
        return names.first_values(await self._call.initial_metadata()).get(names.TRACE_ID, "")

    def _error(self, error: grpc.aio.AioRpcError) -> MeshError:
        mesh_error = call_error(error, self._target, Reason.GATEWAY_UNREACHABLE)
        mesh_error.metadata.setdefault("request_id", self.request_id)
        return mesh_error

    def _broken_off(self) -> MeshError:
        return MeshError(
            Code.INTERNAL,
            Reason.INTERNAL,
            "the answer ended without a finish reason",
            metadata={"request_id": self.request_id, "target": self._target},
        )


class MeshClient(Connection):
    """Talks to a gateway. Every method raises `MeshError` with a code and a reason.

    ```python
    async with MeshClient() as mesh:
        answer = await mesh.complete("ACME buys Initech for $2bn.", task="financial-ner")
        print(answer.text, answer.version, answer.started.switch_kind)
    ```
    """

    def __init__(
        self,
        target: str = DEFAULT_GATEWAY,
        *,
        deadlines: Deadlines | None = None,
        api_key: str = "",
        clock: Clock | None = None,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        """Connects on the first call.

        Args:
            target: host:port of a gateway.
            deadlines: upper bounds of each kind of call.
            api_key: shown with every call; a gateway that asks for none ignores it.
            clock: measures `ttft` and `duration`.
            new_id: makes the ids of requests that name none.
        """
        super().__init__(target, deadlines or Deadlines(), Reason.GATEWAY_UNREACHABLE, api_key)
        self._clock = clock or SystemClock()
        self._new_id = new_id
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt | str,
        *,
        task: str = "",
        adapter: str = "",
        sampling: SamplingParams | None = None,
        n: int = 1,
        ask: Ask | None = None,
        timeout: float | None = None,
    ) -> GenerationStream:
        """Streams an answer.

        Args:
            prompt: a plain string is one user message of a chat; see `Prompt` for the rest.
            task: selects the tenant's route.
            adapter: a ref such as "acme/ner@prod", or "base"; it overrides the task.
            sampling: how tokens are drawn; greedy, at most 256 tokens, if left out.
            n: answers to the same prompt, [1, 8]; with a seed, answer i draws with seed + i.
            ask: tenant, cohort key and the like.
            timeout: seconds until the whole answer must be there; `Deadlines.generate_seconds` if left out.
        """
        asked = ask or Ask()
        request_id = asked.request_id or self._new_id()
        call = self._stub.Generate(
            request_of(prompt, sampling or SamplingParams(temperature=0.0), asked, n),
            timeout=self.deadlines.generate_seconds if timeout is None else timeout,
            metadata=_metadata(task, adapter, request_id, asked),
        )
        return GenerationStream(call, request_id, self.target, self._clock)

    async def complete(
        self,
        prompt: Prompt | str,
        *,
        task: str = "",
        adapter: str = "",
        sampling: SamplingParams | None = None,
        n: int = 1,
        ask: Ask | None = None,
        timeout: float | None = None,
    ) -> Generation:
        """The whole answer at once; the arguments are those of `generate`."""
        stream = self.generate(
            prompt, task=task, adapter=adapter, sampling=sampling, n=n, ask=ask, timeout=timeout
        )
        async with stream:
            return await stream.collect()

    async def list_models(self) -> list[Model]:
        """The base models that live workers serve, then the adapters that can be named."""

        async def page(token: str) -> tuple[list[Model], str]:
            request = inference_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self._call(self._stub.ListModels, request)
            return [wire.model_of(model) for model in response.models], response.next_page_token

        return await all_pages(page)


def _metadata(task: str, adapter: str, request_id: str, ask: Ask) -> tuple[tuple[str, str], ...]:
    """What chooses the adapter travels as metadata; names without a value are left out."""
    position = str(ask.min_feed_position) if ask.min_feed_position else ""
    pairs = (
        (names.TASK, task),
        (names.ADAPTER, adapter),
        (names.TENANT, ask.tenant),
        (names.COHORT_KEY, ask.cohort_key),
        (names.REQUEST_ID, request_id),
        (names.FEED_POSITION, position),
    )
    return tuple((name, value) for name, value in pairs if value)
