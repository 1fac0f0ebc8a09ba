"""The service around the real engine, on a tiny random Llama."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, Reason
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.telemetry.tracing import trace_into
from adaptermesh.worker.service import WorkerService
from adaptermesh.worker.settings import WorkerSettings
from tests.unit.worker.engine.conftest import Adapter, Lab, make_tokenizer
from tests.unit.worker.fake_peers import FakeRouter, FakeStore, Stream, serve_router, serve_store, until

PROMPT = [10, 20, 30, 40]
TRACED = (
    grpc.aio.Metadata(("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
    grpc.aio.Metadata(("traceparent", "00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01")),
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def lab_home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder whose model cache has the tiny Llama."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "models" / "tiny"
    lab.reference_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(lab.facts.config))
    (folder / "base_model.json").write_text(json.dumps(lab.facts.to_json()))
    return home


@dataclass
class RealWorker:
    service: WorkerService
    stub: "worker_pb2_grpc.WorkerServiceAsyncStub"
    store: FakeStore
    router: FakeRouter
    exporter: InMemorySpanExporter
    lab: Lab

    def keep(self, adapter: Adapter) -> None:
        """Puts an adapter into the store."""
        self.store.adapters[adapter.digest] = (adapter.manifest.to_bytes(), adapter.data)

    def generate(self, request_id: str, digest: str = "", max_tokens: int = 8, metadata: Any = None) -> Any:
        sampling = inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = worker_pb2.GenerateRequest(
            request_id=request_id,
            tenant="acme",
            adapter_digest=digest,
            base_digest=self.lab.facts.digest,
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=sampling,
        )
        return self.stub.Generate(request, metadata=metadata, timeout=60)

    async def answer(self, *args: Any, **kwargs: Any) -> tuple[worker_pb2.GenerateStarted, list[int]]:
        """The first message, and all tokens of a stream that ends well."""
        messages = [message async for message in self.generate(*args, **kwargs)]
        assert messages[-1].HasField("finished")
        tokens = [token for message in messages for token in message.delta.token_ids]
        return messages[0].started, tokens

    async def status(self) -> worker_pb2.GetStatusResponse:
        return await self.stub.GetStatus(worker_pb2.GetStatusRequest())

    async def settled(self) -> None:
        """Returns when nothing is held by any request."""
        async with asyncio.timeout(20):
            while True:
                load = (await self.status()).load
                if (load.running_requests, load.waiting_requests, load.kv_used_tokens) == (0, 0, 0):
                    return

    def reported_tiers(self) -> set[int]:
        """Of all versions in all reports to the router."""
        snapshots = [view.tier for report in self.router.snapshots() for view in report.residencies]
        deltas = [view.tier for report in self.router.deltas() for view in report.residencies]
        return {*snapshots, *deltas}

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
async def real(lab: Lab, lab_home: Path, tmp_path: Path) -> AsyncIterator[RealWorker]:
    store, router = FakeStore(part_bytes=4096), FakeRouter()  # type: ignore[abstract]
    store_server, store_port = await serve_store(store)
    router_server, router_port = await serve_router(router)
    settings = WorkerSettings(
        home=lab_home,
        port=0,
        model="tiny",
        store=f"127.0.0.1:{store_port}",
        routers=f"127.0.0.1:{router_port}",
        disk_dir=tmp_path / "disk",
        threads=1,
        kv_tokens=1024,
        max_context_tokens=256,
    )
    exporter = InMemorySpanExporter()
    tracing = trace_into(exporter)
    server = MeshServer("adaptermesh.api.worker.v1.WorkerService", ServerConfig(), tracing)
    context = ServiceContext(settings, tracing, SystemClock(), server)
    service = WorkerService(context)
    service.register(server)
    context.port = await server.start()
    await service.start()
    async with open_channel(f"127.0.0.1:{context.port}") as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        yield RealWorker(service, stub, store, router, exporter, lab)
    await service.drain()
    await server.stop(0)
    await service.stop()
    await store_server.stop(0)
    await router_server.stop(0)


async def test_a_cold_and_a_warm_switch_give_the_adapters_tokens(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    expected = real.lab.continuation(adapter, PROMPT, 8)
    cold, cold_tokens = await real.answer("cold", adapter.digest)
    warm, warm_tokens = await real.answer("warm", adapter.digest)
    base, base_tokens = await real.answer("base")
    assert cold.switch_kind == adapter_pb2.SWITCH_KIND_COLD
    assert warm.switch_kind == adapter_pb2.SWITCH_KIND_WARM
    assert base.switch_kind == adapter_pb2.SWITCH_KIND_UNSPECIFIED
    assert cold_tokens == warm_tokens == expected
    assert base_tokens == real.lab.continuation(None, PROMPT, 8)
    assert base_tokens != expected
    await real.settled()


async def test_one_trace_shows_every_step_of_a_cold_switch(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    await real.answer("cold", adapter.digest, metadata=TRACED[0])
    names = ("worker.admit", "adapter.fetch", "adapter.h2d", "engine.prefill", "engine.decode")
    await until(lambda: all(real.spans(name) for name in names))
    (rpc,) = [span for span in real.exporter.get_finished_spans() if span.name.endswith("/Generate")]
    for name in names:
        (span,) = real.spans(name)
        assert span.parent is not None
        assert rpc.context is not None
        assert span.parent.span_id == rpc.context.span_id
    attributes = real.spans("worker.admit")[0].attributes
    assert attributes is not None
    assert attributes["adaptermesh.switch.kind"] == "cold"
    assert attributes["adaptermesh.switch.shared_fetch"] is False
    assert attributes["adaptermesh.adapter.bytes"] == len(adapter.data)


async def test_concurrent_misses_share_one_fetch_and_the_other_trace_links_to_it(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    gate = asyncio.Event()
    real.store.scripts[adapter.digest] = [Stream(hold=gate)]
    answers = [
        asyncio.create_task(real.answer(f"r{number}", adapter.digest, metadata=TRACED[number]))
        for number in range(2)
    ]
    async with asyncio.timeout(20):
        while (await real.status()).load.waiting_requests < 2:
            pass
    gate.set()
    tokens = [(await answer)[1] for answer in answers]
    assert tokens[0] == tokens[1] == real.lab.continuation(adapter, PROMPT, 8)
    assert len(real.store.fetches) == 1
    await until(lambda: len(real.spans("worker.admit")) == 2)
    (fetch,) = real.spans("adapter.fetch")
    links = [[link.context for link in span.links] for span in real.spans("worker.admit")]
    assert sorted(links, key=len) == [[], [fetch.context]]


async def test_the_usage_and_the_trace_say_what_the_prefix_cache_had(real: RealWorker) -> None:
    prompt = list(range(40))
    for request_id, metadata in (("cold", TRACED[0]), ("alike", TRACED[1])):
        request = worker_pb2.GenerateRequest(
            request_id=request_id,
            tenant="acme",
            base_digest=real.lab.facts.digest,
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=inference_pb2.SamplingParams(max_tokens=1),
        )
        messages = [message async for message in real.stub.Generate(request, metadata=metadata)]
        assert messages[-1].finished.cached_tokens == (0 if request_id == "cold" else 32)
    await until(lambda: len(real.spans("engine.prefill")) == 2)
    found = [dict(span.attributes or {}) for span in real.spans("engine.prefill")]
    assert [usage["gen_ai.usage.cache_read.input_tokens"] for usage in found] == [0, 32]


async def test_an_unknown_digest_is_not_found(real: RealWorker) -> None:
    digest = digest_bytes(b"nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.answer("r1", digest)
    error = mesh_error_from(caught.value)
    assert (error.code, error.reason) == (Code.NOT_FOUND, Reason.VERSION_NOT_FOUND)
    assert error.metadata["digest"] == digest
    await real.settled()


async def test_damaged_bytes_are_never_served(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    damaged = bytearray(adapter.data)
    damaged[-1] ^= 1
    real.store.adapters[adapter.digest] = (adapter.manifest.to_bytes(), bytes(damaged))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.answer("r1", adapter.digest)
    error = mesh_error_from(caught.value)
    assert (error.code, error.reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
    real.keep(adapter)
    assert (await real.answer("r2", adapter.digest))[1] == real.lab.continuation(adapter, PROMPT, 8)


async def test_a_stream_that_ends_early_is_damage_not_an_adapter(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.store.adapters[adapter.digest] = (adapter.manifest.to_bytes(), adapter.data[:-10])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await real.answer("r1", adapter.digest)
    assert mesh_error_from(caught.value).reason is Reason.DATA_CORRUPT


async def test_a_cancelled_call_frees_all_that_it_held(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    call = real.generate("r1", adapter.digest, max_tokens=200)
    while not (await call.read()).HasField("delta"):
        pass
    call.cancel()
    await real.settled()
    assert [residency.requests for residency in (await real.status()).residencies] == [0]


async def test_a_load_warms_and_an_eviction_forgets(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    loaded = await real.stub.LoadAdapter(worker_pb2.LoadAdapterRequest(digest=adapter.digest, pin=True))
    assert (loaded.residency.tier, loaded.residency.pinned) == (adapter_pb2.TIER_DEVICE, True)
    await until(lambda: adapter_pb2.TIER_DEVICE in real.reported_tiers())
    started, _ = await real.answer("r1", adapter.digest)
    assert started.switch_kind == adapter_pb2.SWITCH_KIND_WARM
    await real.settled()
    await real.stub.EvictAdapter(worker_pb2.EvictAdapterRequest(digest=adapter.digest))
    assert not (await real.status()).residencies
    await until(lambda: adapter_pb2.TIER_STORE in real.reported_tiers())


async def test_a_pin_goes_over_the_wire_and_comes_off_again(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    load = worker_pb2.LoadAdapterRequest(digest=adapter.digest, tier=adapter_pb2.TIER_HOST, pin=True)
    assert (await real.stub.LoadAdapter(load)).residency.pinned
    (residency,) = (await real.status()).residencies
    assert (residency.tier, residency.pinned) == (adapter_pb2.TIER_HOST, True)
    unpin = worker_pb2.UnpinAdapterRequest(digest=adapter.digest)
    assert not (await real.stub.UnpinAdapter(unpin)).residency.pinned
    (residency,) = (await real.status()).residencies
    assert (residency.tier, residency.pinned) == (adapter_pb2.TIER_HOST, False)
    budgets = (await real.status()).load.budgets
    while budgets.disk_used_bytes == 0:
        # Written behind the load.
        await asyncio.sleep(0.001)
        budgets = (await real.status()).load.budgets
    assert budgets.host_used_bytes == budgets.disk_used_bytes == len(adapter.data)
    assert budgets.kv_total_bytes > 0


async def test_a_drain_lets_the_running_request_end(real: RealWorker) -> None:
    call = real.generate("r1", max_tokens=100)
    await call.read()
    draining = asyncio.create_task(real.service.drain())
    messages = [message async for message in call]
    assert messages[-1].finished.output_tokens == 100
    await draining


async def test_penalties_and_log_probabilities_come_through_the_real_engine(real: RealWorker) -> None:
    sampling = inference_pb2.SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, repetition_penalty=1.5, presence_penalty=1, logprobs=2
    )
    request = worker_pb2.GenerateRequest(
        request_id="r1",
        tenant="acme",
        base_digest=real.lab.facts.digest,
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=sampling,
    )
    messages = [message async for message in real.stub.Generate(request, timeout=60)]
    tokens = [token for message in messages for token in message.delta.token_ids]
    logprobs = [found for message in messages for found in message.delta.logprobs]
    assert [found.token_id for found in logprobs] == tokens
    expected = real.lab.logits(None, PROMPT + tokens)[len(PROMPT) - 1 : -1].log_softmax(-1)
    for row, found in zip(expected, logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-3)
        assert [top.logprob for top in found.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    assert tokens != real.lab.continuation(None, PROMPT, 8)


async def test_the_prompt_is_told_of_once_however_many_answers_there_are(real: RealWorker) -> None:
    adapter = real.lab.adapter(1)
    real.keep(adapter)
    request = worker_pb2.GenerateRequest(
        request_id="r1",
        tenant="acme",
        adapter_digest=adapter.digest,
        base_digest=real.lab.facts.digest,
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=inference_pb2.SamplingParams(max_tokens=4, ignore_eos=True, prompt_logprobs=2),
        n=3,
    )
    messages = [message async for message in real.stub.Generate(request, timeout=60)]
    found = [one for message in messages for one in message.prompt_logprobs.logprobs]
    assert [one.token_id for one in found] == PROMPT[1:]
    expected = real.lab.logits(adapter, PROMPT)[:-1].log_softmax(-1)
    for row, one in zip(expected, found, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
        assert [top.token_id for top in one.top] == row.topk(2).indices.tolist()
    events = [message.WhichOneof("event") for message in messages if message.delta.index == 0]
    assert events.index("prompt_logprobs") < events.index("delta")
    assert messages[-1].finished.output_tokens == 12
    await real.settled()


async def test_each_answer_is_the_one_its_seed_gives_alone(real: RealWorker) -> None:
    def request(request_id: str, n: int, seed: int) -> worker_pb2.GenerateRequest:
        return worker_pb2.GenerateRequest(
            request_id=request_id,
            tenant="acme",
            base_digest=real.lab.facts.digest,
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=inference_pb2.SamplingParams(max_tokens=8, ignore_eos=True, seed=seed),
            n=n,
        )

    messages = [message async for message in real.stub.Generate(request("r1", 3, 7), timeout=60)]
    answers: list[list[int]] = [[], [], []]
    for message in messages:
        answers[message.delta.index].extend(message.delta.token_ids)
    ends = [message.choice_finished for message in messages if message.HasField("choice_finished")]
    assert sorted((end.index, end.output_tokens) for end in ends) == [(0, 8), (1, 8), (2, 8)]
    assert {end.finish_reason for end in ends} == {inference_pb2.FINISH_REASON_LENGTH}
    finished = messages[-1].finished
    assert (finished.prompt_tokens, finished.output_tokens) == (len(PROMPT), 24)
    for index, answer in enumerate(answers):
        alone = [message async for message in real.stub.Generate(request(f"a{index}", 0, 7 + index))]
        assert [token for message in alone for token in message.delta.token_ids] == answer
        assert not any(message.HasField("choice_finished") for message in alone)
    await real.settled()


async def test_leaving_frees_every_answer(real: RealWorker) -> None:
    request = worker_pb2.GenerateRequest(
        request_id="r1",
        tenant="acme",
        base_digest=real.lab.facts.digest,
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=inference_pb2.SamplingParams(max_tokens=200, ignore_eos=True),
        n=4,
    )
    call: Any = real.stub.Generate(request, timeout=60)
    assert (await call.read()).HasField("started")
    call.cancel()
    await real.settled()
