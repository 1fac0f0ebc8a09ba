"""A gateway over real gRPC, with a router, a store and workers that do what the test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaptermesh.api.access.v1 import access_pb2
from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc
from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, not_found, unavailable
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.gateway.service import GatewayService
from adaptermesh.gateway.settings import GatewaySettings
from adaptermesh.rpc.metadata import first_values
from adaptermesh.rpc.sampling import logprobs_messages, read_logprobs
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.rpc.status import abort, mesh_error_from
from adaptermesh.telemetry.tracing import trace_into

Context = Any
Behaviour = Callable[["FakeWorker", worker_pb2.GenerateRequest, Context], Awaitable[None]]
Decide = Callable[[router_pb2.DispatchRequest], router_pb2.DispatchResponse]

BASE_DIGEST = digest_bytes(b"base")


def version(name: str = "ner", number: int = 3, **fields: Any) -> adapter_pb2.Version:
    values: dict[str, Any] = {
        "namespace": "acme",
        "name": name,
        "number": number,
        "digest": digest_bytes(f"acme/{name}:v{number}".encode()),
        "base_digest": BASE_DIGEST,
        "base_model_id": "tiny",
        "task": "financial-ner",
        "op_kinds": ["lowrank"],
        "size_bytes": 1234,
        "servable": True,
    }
    return adapter_pb2.Version(**{**values, **fields})


def started(worker_id: str, request: worker_pb2.GenerateRequest) -> worker_pb2.GenerateResponse:
    has_adapter = bool(request.adapter_digest)
    return worker_pb2.GenerateResponse(
        started=worker_pb2.GenerateStarted(
            worker_id=worker_id,
            tier=adapter_pb2.TIER_HOST if has_adapter else adapter_pb2.TIER_UNSPECIFIED,
            switch_kind=adapter_pb2.SWITCH_KIND_COOL if has_adapter else adapter_pb2.SWITCH_KIND_UNSPECIFIED,
            prompt_tokens=5,
        )
    )


def delta(text: str, *token_ids: int) -> worker_pb2.GenerateResponse:
    return worker_pb2.GenerateResponse(delta=inference_pb2.GenerateDelta(text=text, token_ids=token_ids))


def finished(output_tokens: int = 2) -> worker_pb2.GenerateResponse:
    done = inference_pb2.GenerateFinished(
        finish_reason=inference_pb2.FINISH_REASON_STOP,
        prompt_tokens=5,
        output_tokens=output_tokens,
        cached_tokens=4,
    )
    done.timings.queue.FromMilliseconds(7)
    done.timings.h2d.FromMilliseconds(2)
    return worker_pb2.GenerateResponse(finished=done)


async def answer(worker: "FakeWorker", request: worker_pb2.GenerateRequest, context: Context) -> None:
    """What a worker in good health does."""
    await context.write(started(worker.worker_id, request))
    if request.sampling.HasField("prompt_logprobs"):
        for token in (7, 8):
            piece = inference_pb2.PromptLogprobs(logprobs=logprobs_messages([TokenLogprobs(token, -1.5)]))
            await context.write(worker_pb2.GenerateResponse(prompt_logprobs=piece))
    first = delta("Hello", 1)
    if request.sampling.HasField("logprobs"):
        first.delta.logprobs.extend(logprobs_messages([TokenLogprobs(1, -0.5, ((2, -0.25),))]))
    await context.write(first)
    await context.write(delta(" you", 2))
    for index in range(request.n if request.n > 1 else 0):
        end = inference_pb2.ChoiceFinished(index=index, output_tokens=2)
        await context.write(worker_pb2.GenerateResponse(choice_finished=end))
    await context.write(finished())


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Behaves as it is told; a MeshError becomes the call's status."""

    def __init__(self, worker_id: str, behaviour: Behaviour) -> None:
        self.worker_id = worker_id
        self.behaviour = behaviour
        self.address = ""
        self.requests: list[worker_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.time_remaining: list[float | None] = []
        self.cancelled = asyncio.Event()
        self.server = grpc.aio.server()

    async def Generate(self, request: worker_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        self.requests.append(request)
        self.metadata.append(first_values(context.invocation_metadata()))
        self.time_remaining.append(context.time_remaining())
        try:
            await self.behaviour(self, request, context)
        except MeshError as error:
            await abort(context, error)
        except (asyncio.CancelledError, grpc.aio.InternalError):
            # The second is what a write says that finds the call ended.
            self.cancelled.set()
            raise asyncio.CancelledError from None

    def GetStatus(self, request: Any, context: Context) -> Any:
        raise NotImplementedError

    def LoadAdapter(self, request: Any, context: Context) -> Any:
        raise NotImplementedError

    def UnpinAdapter(self, request: Any, context: Context) -> Any:
        raise NotImplementedError

    def EvictAdapter(self, request: Any, context: Context) -> Any:
        raise NotImplementedError


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Sends each request to the first worker that is not excluded."""

    def __init__(self) -> None:
        self.workers: list[tuple[str, str]] = []
        self.version: adapter_pb2.Version | None = version()
        self.decide: Decide = self.first_worker
        self.connected = True
        self.hangs = False
        self.status_requests = 0
        self.requests: list[router_pb2.DispatchRequest] = []
        self.views: list[router_pb2.WorkerView] = []

    def first_worker(self, request: router_pb2.DispatchRequest) -> router_pb2.DispatchResponse:
        left = [worker for worker in self.workers if worker[0] not in request.excluded_worker_ids]
        if not left:
            raise unavailable(Reason.NO_WORKER, "no live worker", 1.0)
        worker_id, address = left[0]
        is_route = request.WhichOneof("target") == "task"
        is_base = request.WhichOneof("target") is None or request.ref == "base"
        return router_pb2.DispatchResponse(
            version=None if is_base else self.version,
            base_digest=BASE_DIGEST,
            base_model_id="tiny",
            ref="acme/ner@prod" if is_route else request.ref or "base",
            cohort="control" if is_route else "",
            route_generation=4 if is_route else 0,
            worker_id=worker_id,
            worker_address=address,
            tier=adapter_pb2.TIER_HOST,
        )

    async def Dispatch(
        self, request: router_pb2.DispatchRequest, context: Context
    ) -> router_pb2.DispatchResponse:
        self.requests.append(request)
        if self.hangs:
            await asyncio.Event().wait()
        try:
            return self.decide(request)
        except MeshError as error:
            await abort(context, error)
            raise

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: Context
    ) -> router_pb2.ListWorkersResponse:
        return router_pb2.ListWorkersResponse(workers=self.views)

    async def GetRouterStatus(
        self, request: router_pb2.GetRouterStatusRequest, context: Context
    ) -> router_pb2.GetRouterStatusResponse:
        self.status_requests += 1
        return router_pb2.GetRouterStatusResponse(feed_connected=self.connected)

    def ReportWorker(self, request_iterator: Any, context: Context) -> Any:
        raise NotImplementedError


class FakeStore:
    """ListAdapters and ResolveRef over a list of adapters; page tokens are the next index."""

    def __init__(self) -> None:
        self.adapters: list[store_pb2.AdapterSummary] = []
        self.versions: dict[str, adapter_pb2.Version] = {}
        self.resolved: list[str] = []
        self.callers: dict[str, access_pb2.GetCallerResponse] = {}
        """Whom each `authorization` stands for."""
        self.asked = 0
        self.away = False
        self.shown: list[str] = []
        """What came with each call for adapters."""

    def add(self, newest: adapter_pb2.Version, **aliases: adapter_pb2.Version) -> None:
        self.adapters.append(
            store_pb2.AdapterSummary(
                newest=newest,
                version_count=newest.number,
                aliases=[
                    adapter_pb2.Alias(
                        namespace=to.namespace,
                        name=to.name,
                        alias=alias,
                        version_number=to.number,
                        digest=to.digest,
                    )
                    for alias, to in aliases.items()
                ],
            )
        )
        for known in (newest, *aliases.values()):
            self.versions[f"{known.namespace}/{known.name}@{known.digest}"] = known

    async def list_adapters(
        self, request: store_pb2.ListAdaptersRequest, context: Context
    ) -> store_pb2.ListAdaptersResponse:
        self.shown.append(first_values(context.invocation_metadata()).get("authorization", ""))
        begin = int(request.page_token or "0")
        end = begin + request.page_size
        return store_pb2.ListAdaptersResponse(
            adapters=self.adapters[begin:end], next_page_token=str(end) if end < len(self.adapters) else ""
        )

    async def resolve_ref(
        self, request: store_pb2.ResolveRefRequest, context: Context
    ) -> store_pb2.ResolveRefResponse:
        self.resolved.append(request.ref)
        found = self.versions.get(request.ref)
        if found is None:
            await abort(context, not_found(Reason.VERSION_NOT_FOUND, "version", request.ref))
        return store_pb2.ResolveRefResponse(version=found)

    async def get_caller(
        self, request: access_pb2.GetCallerRequest, context: Context
    ) -> access_pb2.GetCallerResponse:
        self.asked += 1
        if self.away:
            await abort(context, unavailable(Reason.STORE_UNREACHABLE, "no database", 1.0))
        found = self.callers.get(first_values(context.invocation_metadata()).get("authorization", ""))
        if found is None:
            await abort(context, MeshError(Code.UNAUTHENTICATED, Reason.KEY_INVALID, "no such key"))
        assert found is not None
        return found

    def register(self, server: grpc.aio.Server) -> None:
        access = {
            "GetCaller": grpc.unary_unary_rpc_method_handler(
                self.get_caller,
                request_deserializer=access_pb2.GetCallerRequest.FromString,
                response_serializer=access_pb2.GetCallerResponse.SerializeToString,
            )
        }
        access_name = access_pb2.DESCRIPTOR.services_by_name["AccessService"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(access_name, access),))
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ListAdapters": grpc.unary_unary_rpc_method_handler(
                self.list_adapters,
                request_deserializer=store_pb2.ListAdaptersRequest.FromString,
                response_serializer=store_pb2.ListAdaptersResponse.SerializeToString,
            ),
            "ResolveRef": grpc.unary_unary_rpc_method_handler(
                self.resolve_ref,
                request_deserializer=store_pb2.ResolveRefRequest.FromString,
                response_serializer=store_pb2.ResolveRefResponse.SerializeToString,
            ),
        }
        name = store_pb2.DESCRIPTOR.services_by_name["StoreService"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


class Wire:
    """A TCP connection to a worker that can be cut as by a kill -9."""

    def __init__(self) -> None:
        self.address = ""
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, target: str) -> None:
        """Listens; started again after a cut, it is at the same address: a worker that came back."""
        host, _, port = target.rpartition(":")

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.append(writer)
            self._own(self._join(reader, writer, host, int(port)))

        own_port = int(self.address.rpartition(":")[2] or 0)
        self._server = await asyncio.start_server(accept, "127.0.0.1", own_port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def cut(self) -> None:
        """Resets every connection and takes no new one."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def _join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port)
        self._writers.append(far_writer)
        self._own(self._pump(reader, far_writer))
        self._own(self._pump(far_reader, writer))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            return


@dataclass(slots=True)
class Answer:
    """What a client saw of one call."""

    started: inference_pb2.GenerateStarted | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: inference_pb2.GenerateFinished | None = None
    order: list[str] = field(default_factory=list)
    initial: dict[str, str] = field(default_factory=dict)
    trailing: dict[str, str] = field(default_factory=dict)
    error: MeshError | None = None

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        self.order.append(kind or "")
        match kind:
            case "started":
                self.started = response.started
            case "prompt_logprobs":
                self.prompt_logprobs += read_logprobs(response.prompt_logprobs.logprobs)
            case "delta":
                self.text += response.delta.text
                self.token_ids += response.delta.token_ids
                self.logprobs += read_logprobs(response.delta.logprobs)
            case "finished":
                self.finished = response.finished

    @property
    def failure(self) -> MeshError:
        assert self.error is not None, self.order
        return self.error


def pairs(metadata: Any) -> dict[str, str]:
    return first_values(metadata)


class Mesh:
    """One gateway and its peers."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._exporter = InMemorySpanExporter()
        self.router = FakeRouter()
        self.store = FakeStore()
        self.router_server = grpc.aio.server()
        self.router_address = ""
        self.store_address = ""
        self.service: GatewayService
        self.server: MeshServer
        self.channel: grpc.aio.Channel
        self.stub: inference_pb2_grpc.InferenceServiceAsyncStub

    async def add_worker(self, worker_id: str, behaviour: Behaviour = answer) -> FakeWorker:
        """A worker that the router knows."""
        worker = FakeWorker(worker_id, behaviour)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, worker.server)
        worker.address = f"127.0.0.1:{worker.server.add_insecure_port('127.0.0.1:0')}"
        await worker.server.start()
        self._stack.push_async_callback(worker.server.stop, 0)
        self.router.workers.append((worker_id, worker.address))
        return worker

    async def add_wired_worker(
        self, worker_id: str, behaviour: Behaviour = answer
    ) -> tuple[FakeWorker, Wire]:
        """A worker whose connections can be cut."""
        worker = await self.add_worker(worker_id, behaviour)
        wire = Wire()
        await wire.start(worker.address)
        self._stack.push_async_callback(wire.cut)
        self.router.workers[-1] = (worker_id, wire.address)
        return worker, wire

    async def start_router(self, address: str = "127.0.0.1:0") -> None:
        self.router_server = grpc.aio.server()
        router_pb2_grpc.add_RouterServiceServicer_to_server(self.router, self.router_server)
        self.router_address = f"127.0.0.1:{self.router_server.add_insecure_port(address)}"
        await self.router_server.start()
        self._stack.push_async_callback(self.router_server.stop, 0)

    async def start_store(self) -> None:
        server = grpc.aio.server()
        self.store.register(server)
        self.store_address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._stack.push_async_callback(server.stop, 0)

    async def start_gateway(self, *, wait: bool = True, **overrides: Any) -> None:
        """Starts the gateway as its process would; `wait=False` returns before it is ready."""
        settings = GatewaySettings(
            **{
                "port": 0,
                "router": self.router_address,
                "store": self.store_address,
                "health_interval_seconds": 0.01,
                "drain_seconds": 5.0,
                **overrides,
            }
        )
        tracing = trace_into(self._exporter)
        self.server = MeshServer(
            "adaptermesh.api.inference.v1.InferenceService",
            ServerConfig("127.0.0.1", 0, grace_seconds=0),
            tracing,
        )
        context = ServiceContext(settings, tracing, SystemClock(), self.server)
        self.service = GatewayService(context)
        self.service.register(self.server)
        context.port = await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{context.port}")
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._stack.push_async_callback(self.service.stop)
        self._stack.push_async_callback(self.server.stop, 0)
        self._stack.push_async_callback(self.channel.close)
        if wait:
            await self.service.start()

    async def generate(
        self,
        request: inference_pb2.GenerateRequest | None = None,
        *,
        timeout: float | None = 30.0,
        **metadata: str,
    ) -> Answer:
        """One whole call; metadata is given as `x_model_task="ner"`."""
        call = self.call(request, timeout=timeout, **metadata)
        seen = Answer()
        try:
            async for response in call:
                seen.take(response)
        except grpc.aio.AioRpcError as error:
            seen.error = mesh_error_from(error)
        seen.initial = pairs(await call.initial_metadata())
        seen.trailing = pairs(await call.trailing_metadata())
        return seen

    def call(
        self,
        request: inference_pb2.GenerateRequest | None = None,
        *,
        timeout: float | None = 30.0,
        **metadata: str,
    ) -> Any:
        """A running call."""
        sent = request or inference_pb2.GenerateRequest(text="Say hello")
        headers = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
        return self.stub.Generate(sent, metadata=headers, timeout=timeout)

    async def span(self) -> ReadableSpan:
        """The span of the one request that has ended."""
        await until(lambda: bool(self.spans("gateway.request")))
        (found,) = self.spans("gateway.request")
        return found

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


async def until(condition: Callable[[], bool]) -> None:
    """Waits, within bounds, until something holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is awaited happens in another part of the mesh
            await asyncio.sleep(0.005)


def refusing(error: MeshError) -> Behaviour:
    """A worker that refuses with an error before it starts."""

    async def behave(worker: FakeWorker, request: worker_pb2.GenerateRequest, context: Context) -> None:
        raise error

    return behave


def sending(*responses: worker_pb2.GenerateResponse) -> Behaviour:
    """A worker that sends just these messages."""

    async def behave(worker: FakeWorker, request: worker_pb2.GenerateRequest, context: Context) -> None:
        for response in responses:
            await context.write(response)

    return behave


def starting_then(after: Callable[[Context], Awaitable[None]]) -> Behaviour:
    """A worker that starts, sends one delta, and goes on as told."""

    async def behave(worker: FakeWorker, request: worker_pb2.GenerateRequest, context: Context) -> None:
        await context.write(started(worker.worker_id, request))
        await context.write(delta("Hello", 1))
        await after(context)

    return behave


async def hanging(worker: FakeWorker, request: worker_pb2.GenerateRequest, context: Context) -> None:
    """A worker that never answers."""
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Fakes:
    """What tests build behaviours from."""

    version: Callable[..., adapter_pb2.Version] = version
    started: Callable[..., worker_pb2.GenerateResponse] = started
    delta: Callable[..., worker_pb2.GenerateResponse] = delta
    finished: Callable[..., worker_pb2.GenerateResponse] = finished
    refusing: Callable[[MeshError], Behaviour] = refusing
    sending: Callable[..., Behaviour] = sending
    starting_then: Callable[[Callable[[Context], Awaitable[None]]], Behaviour] = starting_then
    hanging: Behaviour = hanging
    until: Callable[[Callable[[], bool]], Awaitable[None]] = until
    base_digest: str = BASE_DIGEST


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
async def peers() -> AsyncIterator[Mesh]:
    """Router and store run; the test starts the gateway with the settings that it needs."""
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        await mesh.start_router()
        await mesh.start_store()
        yield mesh


@pytest.fixture
async def mesh(peers: Mesh) -> Mesh:
    """A gateway that is ready."""
    await peers.start_gateway()
    return peers
