"""A whole worker over real gRPC with a scripted engine, a fake store and a fake router."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import safetensors.numpy
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.telemetry.tracing import trace_into
from adaptermesh.worker.service import LoadedBackend, WorkerService
from adaptermesh.worker.settings import WorkerSettings
from tests.unit.worker.fake_peers import FakeRouter, FakeStore, serve_router, serve_store
from tests.unit.worker.scripted_engine import ScriptedEngine

VOCAB_SIZE = 300
MAX_CONTEXT = 64


class CharTokenizer:
    """One token a character."""

    chat_template: Any = "a template"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCAB_SIZE for character in text]}

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        found: list[int] = self(turns + "<assistant>")["input_ids"]
        return found


@pytest.fixture
def base() -> BaseFacts:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_CONTEXT,
    }
    return BaseFacts.from_config("tiny", config, digest_bytes(b"weights"))


@pytest.fixture
def home(tmp_path: Path, base: BaseFacts) -> Path:
    """A home folder whose model cache has `tiny`."""
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(base.config))
    (folder / "base_model.json").write_text(json.dumps(base.to_json()))
    safetensors.numpy.save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return tmp_path


@dataclass
class Worker:
    """What a test can reach of a running worker."""

    service: WorkerService
    server: MeshServer
    stub: "worker_pb2_grpc.WorkerServiceAsyncStub"
    engine: ScriptedEngine
    store: FakeStore
    router: FakeRouter
    spans: InMemorySpanExporter
    base: BaseFacts
    port: int

    def request(self, request_id: str = "r1", **fields: Any) -> worker_pb2.GenerateRequest:
        values: dict[str, Any] = {"tenant": "acme", "base_digest": self.base.digest}
        if not {"text", "chat", "token_ids"} & fields.keys():
            values["text"] = "abc"
        return worker_pb2.GenerateRequest(request_id=request_id, **{**values, **fields})


StartWorker = Callable[..., Any]


@pytest.fixture
async def start_worker(home: Path, base: BaseFacts) -> AsyncIterator[StartWorker]:
    """Starts workers with settings of the test's choice and stops them afterwards."""
    stops: list[Callable[[], Any]] = []

    async def start(store_address: str = "", **settings: Any) -> Worker:
        store, router = FakeStore(), FakeRouter()  # type: ignore[abstract]
        store_server, store_port = await serve_store(store)
        router_server, router_port = await serve_router(router)
        stops.extend([lambda: store_server.stop(0), lambda: router_server.stop(0)])
        exporter, engine = InMemorySpanExporter(), ScriptedEngine()
        values: dict[str, Any] = {
            "home": home,
            "port": 0,
            "model": "tiny",
            "store": store_address or f"127.0.0.1:{store_port}",
            "routers": f"127.0.0.1:{router_port}",
            "drain_seconds": 5.0,
        }
        options = WorkerSettings(**{**values, **settings})
        tracing = trace_into(exporter)
        server = MeshServer("adaptermesh.api.worker.v1.WorkerService", ServerConfig(), tracing)
        context = ServiceContext(options, tracing, SystemClock(), server)
        loaded = LoadedBackend(engine, base, CharTokenizer(), MAX_CONTEXT)
        service = WorkerService(context, lambda *_: loaded)
        service.register(server)
        context.port = await server.start()
        await service.start()
        channel = open_channel(f"127.0.0.1:{context.port}")

        async def stop() -> None:
            await channel.close()
            await server.stop(0)
            await service.stop()

        stops.insert(0, stop)
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return Worker(service, server, stub, engine, store, router, exporter, base, context.port)

    yield start
    for stop in stops:
        await stop()


@pytest.fixture
async def worker(start_worker: StartWorker) -> Worker:
    running: Worker = await start_worker()
    return running


async def read_all(
    call: "grpc.aio.UnaryStreamCall[Any, worker_pb2.GenerateResponse]",
) -> list[worker_pb2.GenerateResponse]:
    return [message async for message in call]
