"""The mesh's services from memory: enough of them for a client to talk to."""

import asyncio
import datetime
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2, inference_pb2_grpc
from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.client import GATEWAY_SERVICE, ROUTER_SERVICE, STORE_SERVICE, WORKER_SERVICE
from adaptermesh.core.digests import digest_bytes, digest_json
from adaptermesh.core.errors import Code, MeshError, Reason, not_found, unavailable
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.refs import parse_ref
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.sampling import logprobs_messages
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.telemetry.tracing import no_tracing

BASE = adapter_pb2.BaseModel(
    model_id="tiny", digest="sha256:" + "b" * 64, architecture="LlamaForCausalLM", hidden_size=8, num_layers=2
)
MIB = 2**20
BUDGETS = worker_pb2.Budgets(
    device_used_bytes=3 * MIB,
    device_used_slots=1,
    host_used_bytes=256 * MIB,
    host_budget_bytes=1024 * MIB,
    disk_used_bytes=5 * MIB,
    disk_budget_bytes=10 * MIB,
    kv_used_bytes=MIB,
    kv_cached_bytes=2 * MIB,
    kv_total_bytes=8 * MIB,
)
STEP = 50_000
PAGE = 2
"""Fakes send small pages, whatever is asked for."""


class FakeStore(store_pb2_grpc.StoreServiceServicer):
    """Uploads are checked as the protocol says; tests break what they like."""

    def __init__(self) -> None:
        self.versions: dict[str, list[adapter_pb2.Version]] = {}
        self.searches: list[Any] = []
        self.files: dict[tuple[str, str], bytes] = {}
        self.aliases: dict[str, list[adapter_pb2.Alias]] = {}
        self.routes: dict[tuple[str, str], adapter_pb2.Route] = {}
        self.headers: list[store_pb2.UploadHeader] = []
        self.message_sizes: list[int] = []
        self.offsets: list[int] = []
        self.position = 0
        self.refuse: MeshError | None = None
        self.break_after: int | None = None
        """The next download breaks off after this many bytes."""
        self.corrupt = 0
        """So many of the next downloads bring wrong bytes."""

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> store_pb2.UploadAdapterResponse:
        first = await anext(request_iterator)
        assert first.WhichOneof("part") == "header"
        header = first.header
        self.headers.append(header)
        if self.refuse is not None:
            raise self.refuse
        contents = await self._contents(header, request_iterator)
        name = f"{header.namespace}/{header.name}"
        digest = digest_json({path: digest_bytes(data) for path, data in contents.items()})
        known = next((v for v in self.versions.get(name, []) if v.digest == digest), None)
        version = known or self._version(header, name, digest)
        if known is None and not header.validate_only:
            self.position += 1
            self.versions.setdefault(name, []).append(version)
            self.files.update({(digest, path): data for path, data in contents.items()})
        created = known is None and not header.validate_only
        return store_pb2.UploadAdapterResponse(version=version, created=created, feed_position=self.position)

    async def _contents(self, header: store_pb2.UploadHeader, messages: Any) -> dict[str, bytes]:
        contents = {file.path: b"" for file in header.files}
        left = [file for file in header.files if file.size_bytes]
        async for message in messages:
            assert message.WhichOneof("part") == "data"
            assert 0 < len(message.data) <= MIB
            self.message_sizes.append(len(message.data))
            contents[left[0].path] += message.data
            # A message that ran over the end of its file would show up here.
            assert len(contents[left[0].path]) <= left[0].size_bytes
            if len(contents[left[0].path]) == left[0].size_bytes:
                left.pop(0)
        for file in header.files:
            assert digest_bytes(contents[file.path]) == file.digest
        return contents

    def _version(self, header: store_pb2.UploadHeader, name: str, digest: str) -> adapter_pb2.Version:
        version = adapter_pb2.Version(
            namespace=header.namespace,
            name=header.name,
            number=len(self.versions.get(name, [])) + 1,
            digest=digest,
            base_digest=BASE.digest,
            base_model_id=header.base_model,
            task=header.task,
            description=header.description,
            tags=header.tags,
            license=header.license,
            kind="lora",
            op_kinds=["lowrank"],
            max_rank=4,
            size_bytes=sum(file.size_bytes for file in header.files),
            servable=True,
            warnings=[] if header.license else ["no license"],
            source_files=header.files,
        )
        version.create_time.FromDatetime(datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
        return version

    async def DownloadFile(self, request: Any, context: Any) -> AsyncIterator[store_pb2.DownloadFileResponse]:
        data = self.files[request.digest, request.path]
        self.offsets.append(request.offset)
        if self.corrupt:
            self.corrupt -= 1
            data = bytes(len(data))
        sent = 0
        for start in range(request.offset, len(data), STEP):
            if self.break_after is not None and sent >= self.break_after:
                self.break_after = None
                raise unavailable(Reason.DRAINING, "going away", 1.0)
            chunk = data[start : start + STEP]
            sent += len(chunk)
            yield store_pb2.DownloadFileResponse(data=chunk)

    async def ResolveRef(self, request: Any, context: Any) -> store_pb2.ResolveRefResponse:
        ref = parse_ref(request.ref)
        versions = self.versions.get(str(ref.adapter))
        if versions is None:
            raise not_found(Reason.ADAPTER_NOT_FOUND, "adapter", str(ref.adapter))
        number = ref.version
        if ref.alias is not None:
            if str(ref) not in self.aliases:
                raise not_found(Reason.ALIAS_NOT_FOUND, "alias", str(ref))
            number = self.aliases[str(ref)][-1].version_number
        for version in versions:
            if number == version.number or ref.digest == version.digest:
                return store_pb2.ResolveRefResponse(
                    version=version, aliases=["prod"], manifest=b'{"schema":1}'
                )
        raise not_found(Reason.VERSION_NOT_FOUND, "version", str(ref))

    async def ListSignatures(self, request: Any, context: Any) -> store_pb2.ListSignaturesResponse:
        return store_pb2.ListSignaturesResponse()

    async def GetDownloadCounts(self, request: Any, context: Any) -> store_pb2.GetDownloadCountsResponse:
        return store_pb2.GetDownloadCountsResponse(counts=[7] * len(request.digests))

    async def GetFeedStatus(self, request: Any, context: Any) -> store_pb2.GetFeedStatusResponse:
        oldest = Timestamp(seconds=1_750_000_000)
        return store_pb2.GetFeedStatusResponse(
            feed_id="feed", head_position=30, trimmed_position=10, oldest_commit_time=oldest, watchers=2
        )

    async def ListVersions(self, request: Any, context: Any) -> store_pb2.ListVersionsResponse:
        versions = self.versions.get(f"{request.namespace}/{request.name}")
        if versions is None:
            raise not_found(Reason.ADAPTER_NOT_FOUND, "adapter", f"{request.namespace}/{request.name}")
        items, token = _page(list(reversed(versions)), request.page_token)
        return store_pb2.ListVersionsResponse(versions=items, next_page_token=token)

    async def ListAdapters(self, request: Any, context: Any) -> store_pb2.ListAdaptersResponse:
        found = [
            store_pb2.AdapterSummary(
                newest=versions[-1],
                version_count=len(versions),
                aliases=[moves[-1] for ref, moves in self.aliases.items() if ref.startswith(f"{name}@")],
            )
            for name, versions in sorted(self.versions.items())
            if request.query.lower() in name and request.task in {"", versions[-1].task}
        ]
        items, token = _page(found, request.page_token)
        return store_pb2.ListAdaptersResponse(adapters=items, next_page_token=token)

    async def SearchAdapters(self, request: Any, context: Any) -> store_pb2.SearchAdaptersResponse:
        self.searches.append(request)
        asked = store_pb2.ListAdaptersRequest(
            query=request.text, task=request.task, page_token=request.page_token
        )
        listed = await self.ListAdapters(asked, context)
        tasks = Counter(adapter.newest.task for adapter in listed.adapters)
        values = [store_pb2.FacetValue(value=task, count=count) for task, count in tasks.items()]
        facets = [store_pb2.Facet(field="task", values=values)] if request.with_facets else []
        return store_pb2.SearchAdaptersResponse(
            adapters=listed.adapters, next_page_token=listed.next_page_token, facets=facets
        )

    async def SetAlias(self, request: Any, context: Any) -> store_pb2.SetAliasResponse:
        ref = f"{request.namespace}/{request.name}@{request.alias}"
        moves = self.aliases.setdefault(ref, [])
        if request.HasField("expected_generation") and request.expected_generation != len(moves):
            raise MeshError(
                Code.ABORTED,
                Reason.ALIAS_CONFLICT,
                f"'{ref}' has moved",
                metadata={"generation": str(len(moves))},
            )
        return self._move(ref, request, request.version_number)

    async def RollBackAlias(self, request: Any, context: Any) -> store_pb2.RollBackAliasResponse:
        ref = f"{request.namespace}/{request.name}@{request.alias}"
        moves = self.aliases.get(ref, [])
        if len(moves) < 2:
            raise MeshError(Code.FAILED_PRECONDITION, Reason.ALIAS_NOT_FOUND, f"'{ref}' was never moved")
        done = self._move(ref, request, moves[-2].version_number)
        return store_pb2.RollBackAliasResponse(alias=done.alias, feed_position=done.feed_position)

    def _move(self, ref: str, request: Any, number: int) -> store_pb2.SetAliasResponse:
        versions = self.versions.get(f"{request.namespace}/{request.name}", [])
        if not 1 <= number <= len(versions):
            raise not_found(Reason.VERSION_NOT_FOUND, "version", f"{ref} v{number}")
        self.position += 1
        alias = adapter_pb2.Alias(
            namespace=request.namespace,
            name=request.name,
            alias=request.alias,
            version_number=number,
            digest=versions[number - 1].digest,
            generation=len(self.aliases[ref]) + 1,
            actor=request.actor,
            comment=request.comment,
        )
        self.aliases[ref].append(alias)
        return store_pb2.SetAliasResponse(alias=alias, feed_position=self.position)

    async def ListAliasHistory(self, request: Any, context: Any) -> store_pb2.ListAliasHistoryResponse:
        ref = f"{request.namespace}/{request.name}@{request.alias}"
        if ref not in self.aliases:
            raise not_found(Reason.ALIAS_NOT_FOUND, "alias", ref)
        items, token = _page(list(reversed(self.aliases[ref])), request.page_token)
        return store_pb2.ListAliasHistoryResponse(moves=items, next_page_token=token)

    async def SetRoute(self, request: Any, context: Any) -> store_pb2.SetRouteResponse:
        key = (request.route.tenant, request.route.task)
        before = self.routes.get(key)
        generation = before.generation if before else 0
        if request.HasField("expected_generation") and request.expected_generation != generation:
            raise MeshError(Code.ABORTED, Reason.ROUTE_CONFLICT, f"the route {key} has changed")
        self.position += 1
        route = adapter_pb2.Route()
        route.CopyFrom(request.route)
        route.generation = generation + 1
        self.routes[key] = route
        return store_pb2.SetRouteResponse(route=route, feed_position=self.position)

    async def DeleteRoute(self, request: Any, context: Any) -> store_pb2.DeleteRouteResponse:
        if self.routes.pop((request.tenant, request.task), None) is None:
            raise not_found(Reason.ROUTE_NOT_FOUND, "route", f"{request.tenant} {request.task}")
        self.position += 1
        return store_pb2.DeleteRouteResponse(feed_position=self.position)

    async def ListRoutes(self, request: Any, context: Any) -> store_pb2.ListRoutesResponse:
        found = [route for key, route in sorted(self.routes.items()) if request.tenant in {"", key[0]}]
        items, token = _page(found, request.page_token)
        return store_pb2.ListRoutesResponse(routes=items, next_page_token=token)

    async def ListBaseModels(self, request: Any, context: Any) -> store_pb2.ListBaseModelsResponse:
        return store_pb2.ListBaseModelsResponse(base_models=[BASE])


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Answers every prompt with its words; tests say how it fails."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.words = ["Aye, ", "aye", "!"]
        self.refuse: MeshError | None = None
        self.fail_after: int | None = None
        """Breaks off after so many deltas."""
        self.cached_tokens = 0
        self.warnings: list[str] = []
        self.finish = True
        self.hang = False
        """Goes on for ever after the first delta."""
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        sent = names.read(context)
        self.requests.append(request)
        self.metadata.append(sent)
        if self.refuse is not None:
            raise self.refuse
        await context.send_initial_metadata((("x-trace-id", "0af7651916cd43dd8448eb211c80319c"),))
        started = self._started(sent)
        yield inference_pb2.GenerateResponse(started=started)
        if request.sampling.HasField("prompt_logprobs"):
            for token in (4, 5):
                told = TokenLogprobs(token, -2.0, ((token, -2.0),)[: request.sampling.prompt_logprobs])
                piece = inference_pb2.PromptLogprobs(logprobs=logprobs_messages([told]))
                yield inference_pb2.GenerateResponse(prompt_logprobs=piece)
        for number, word in enumerate(self._words(started)):
            if number == self.fail_after:
                raise unavailable(Reason.WORKER_LOST, "the worker is gone", 0.5, worker_id="w-1")
            delta = inference_pb2.GenerateDelta(text=word, token_ids=[number])
            if request.sampling.HasField("logprobs"):
                top = [(number, -1.0)][: request.sampling.logprobs]
                delta.logprobs.extend(logprobs_messages([TokenLogprobs(number, -1.0, tuple(top))]))
            yield inference_pb2.GenerateResponse(delta=delta)
            for index in range(1, request.n):
                delta.index = index
                yield inference_pb2.GenerateResponse(delta=delta)
            if self.hang:
                await self._until_cancelled()
        for index in range(request.n if request.n > 1 else 0):
            reason = inference_pb2.FINISH_REASON_LENGTH if index else inference_pb2.FINISH_REASON_STOP
            end = inference_pb2.ChoiceFinished(index=index, finish_reason=reason, output_tokens=3)
            yield inference_pb2.GenerateResponse(choice_finished=end)
        if self.finish:
            yield inference_pb2.GenerateResponse(finished=self._finished())

    def _words(self, started: inference_pb2.GenerateStarted) -> list[str]:
        return self.words

    async def _until_cancelled(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    def _started(self, sent: dict[str, str]) -> inference_pb2.GenerateStarted:
        ref = sent.get(names.ADAPTER) or (f"demo/{sent[names.TASK]}:v1" if names.TASK in sent else "base")
        is_base = ref == "base"
        return inference_pb2.GenerateStarted(
            request_id=sent.get(names.REQUEST_ID, ""),
            adapter_version=ref,
            adapter_digest="" if is_base else "sha256:" + "a" * 64,
            base_digest=BASE.digest,
            ref=ref,
            cohort="canary" if names.TASK in sent else "",
            route_generation=3 if names.TASK in sent else 0,
            worker_id="w-1",
            tier=adapter_pb2.TIER_UNSPECIFIED if is_base else adapter_pb2.TIER_STORE,
            switch_kind=adapter_pb2.SWITCH_KIND_UNSPECIFIED if is_base else adapter_pb2.SWITCH_KIND_COLD,
            prompt_tokens=7,
            warnings=self.warnings,
        )

    def _finished(self) -> inference_pb2.GenerateFinished:
        finished = inference_pb2.GenerateFinished(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            prompt_tokens=7,
            output_tokens=len(self.words),
            cached_tokens=self.cached_tokens,
        )
        for name, milliseconds in (("time_to_first_token", 30), ("queue", 12), ("fetch", 10), ("verify", 2)):
            getattr(finished.timings, name).FromMilliseconds(milliseconds)
        finished.timings.fetched_bytes = 4096
        finished.timings.overlap.FromMilliseconds(2)
        return finished

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        models = [inference_pb2.Model(id="base", base_model_id="tiny")]
        models += [inference_pb2.Model(id=f"demo/a{n}:v1", task="a", aliases=["prod"]) for n in range(4)]
        items, token = _page(models, request.page_token)
        return inference_pb2.ListModelsResponse(models=items, next_page_token=token)


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Knows the workers at the given addresses."""

    def __init__(self, workers: list[str]) -> None:
        self.workers = workers
        self.budgets: worker_pb2.Budgets | None = BUDGETS

    async def ListWorkers(self, request: Any, context: Any) -> router_pb2.ListWorkersResponse:
        return router_pb2.ListWorkersResponse(
            workers=[
                router_pb2.WorkerView(
                    info=worker_info(f"w-{index}", address),
                    state=worker_pb2.WORKER_STATE_READY,
                    load=worker_pb2.Load(
                        running_requests=2, kv_used_tokens=10, kv_total_tokens=100, budgets=self.budgets
                    ),
                    residencies=[residency("sha256:" + "a" * 64, adapter_pb2.TIER_DEVICE, pinned=True)],
                    booked_requests=1,
                )
                for index, address in enumerate(self.workers)
            ]
        )

    async def GetRouterStatus(self, request: Any, context: Any) -> router_pb2.GetRouterStatusResponse:
        return router_pb2.GetRouterStatusResponse(
            feed_position=7, feed_head=7, feed_connected=True, versions=4, routes=3
        )


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Holds what it is told to."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.pinned: set[str] = set()

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.GetStatusResponse:
        return worker_pb2.GetStatusResponse(
            info=worker_info("w-1", "127.0.0.1:1"),
            state=worker_pb2.WORKER_STATE_DRAINING,
            residencies=[self._residency(digest) for digest in self.held],
        )

    async def LoadAdapter(self, request: Any, context: Any) -> worker_pb2.LoadAdapterResponse:
        self.held[request.digest] = request.tier
        if request.pin:
            self.pinned.add(request.digest)
        return worker_pb2.LoadAdapterResponse(residency=self._residency(request.digest))

    async def UnpinAdapter(self, request: Any, context: Any) -> worker_pb2.UnpinAdapterResponse:
        self.pinned.discard(request.digest)
        return worker_pb2.UnpinAdapterResponse(residency=self._residency(request.digest))

    async def EvictAdapter(self, request: Any, context: Any) -> worker_pb2.EvictAdapterResponse:
        self.held.pop(request.digest, None)
        return worker_pb2.EvictAdapterResponse()

    def _residency(self, digest: str) -> worker_pb2.Residency:
        return residency(digest, self.held.get(digest, adapter_pb2.TIER_STORE), digest in self.pinned)


def worker_info(worker_id: str, address: str) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(
        worker_id=worker_id, address=address, device="cpu", base_model=BASE, device_slots=4, base_bytes=10_000
    )


def residency(digest: str, tier: Any, pinned: bool = False) -> worker_pb2.Residency:
    return worker_pb2.Residency(digest=digest, tier=tier, pinned=pinned, size_bytes=100, device_bytes=250)


_REGISTRATIONS: dict[type, tuple[str, Any]] = {
    FakeStore: (STORE_SERVICE, store_pb2_grpc.add_StoreServiceServicer_to_server),
    FakeGateway: (GATEWAY_SERVICE, inference_pb2_grpc.add_InferenceServiceServicer_to_server),
    FakeRouter: (ROUTER_SERVICE, router_pb2_grpc.add_RouterServiceServicer_to_server),
    FakeWorker: (WORKER_SERVICE, worker_pb2_grpc.add_WorkerServiceServicer_to_server),
}


@asynccontextmanager
async def serve(servicer: Any, *, serving: bool = True, port: int = 0) -> AsyncIterator[str]:
    """A server with the mesh's interceptors, health checks and reflection; yields its address."""
    name, register = next(found for kind, found in _REGISTRATIONS.items() if isinstance(servicer, kind))
    server = MeshServer(name, ServerConfig(port=port), no_tracing())
    register(servicer, server.grpc)
    bound = await server.start()
    await server.set_serving(serving)
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)


def _page(items: list[Any], token: str) -> tuple[list[Any], str]:
    start = int(token or 0)
    end = start + PAGE
    return items[start:end], str(end) if end < len(items) else ""


def fake_store() -> FakeStore:
    return FakeStore()  # type: ignore[abstract]  # what no client calls is left out


def fake_router(workers: list[str]) -> FakeRouter:
    return FakeRouter(workers)  # type: ignore[abstract]


def fake_worker() -> FakeWorker:
    return FakeWorker()  # type: ignore[abstract]
