"""Cold switches: a real store process, our engine with the worker's own source, a bare gRPC stream beside."""

import asyncio
import contextlib
import importlib.metadata
import json
import tempfile
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import MeshError
from adaptermesh.core.tiers import Tier
from adaptermesh.rpc.channel import open_channel
from adaptermesh.telemetry.tracing import no_tracing
from adaptermesh.worker.adapter_stream import SourceConfig
from adaptermesh.worker.engine.base import load_base
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.engine import Engine
from adaptermesh.worker.source import GrpcAdapterSource
from tests.bench.adapter_files import CANONICAL_FILE
from tests.bench.peers.raw_server import METHOD, SERVICE, run_raw_server
from tests.bench.peers.rows import Heard, make_request
from tests.bench.peers.serve import serve
from tests.bench.peers.store_process import publish, run_store

_CALL_SECONDS = 60.0
_EVICT_SECONDS = 5.0
_T = TypeVar("_T")


class StorePeer:
    """`cold` loads adapters into the device tier, `stream` only reads them off the store, `raw` neither."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()
        self._digests: dict[str, str] = {}
        self._engine: Engine | None = None
        self._store: Any = None
        self._raw: Any = None

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptermesh-bench-")))
        target = self._stack.enter_context(run_store(home))
        adapters, names = Path(message["adapters"]), message["options"]["names"]
        model = Path(message["model"])
        facts = BaseFacts.from_json(json.loads((model / "base_model.json").read_text()))
        versions = self._on_loop(publish(target, facts, adapters, names))
        self._digests = {name: version.digest for name, version in zip(names, versions, strict=True)}
        source = self._on_loop(self._connect(target))
        config = EngineConfig(disk_dir=home / "disk", dtype="float32")
        self._engine = Engine(config, load_base(model, config), source, SystemClock())
        self._engine.start()
        self._stack.callback(self._engine.stop)
        file = adapters / names[0] / CANONICAL_FILE
        port = self._stack.enter_context(run_raw_server(file))
        self._raw = self._on_loop(self._connect_raw(port))
        packages = {name: importlib.metadata.version(name) for name in ("adaptermesh", "grpcio", "torch")}
        return {"versions": packages, "adapter_bytes": file.stat().st_size}

    def cold(self, message: dict[str, Any]) -> list[float]:
        """Seconds from the wish until the adapter is in its device slot, for each name."""
        times = []
        for name in message["names"]:
            times.append(self._load_cold(self._digests[name]))
            _evict(self._ready(), self._digests[name])
        return times

    def stream(self, message: dict[str, Any]) -> list[float]:
        """Seconds to read each adapter off the store and drop it."""
        return [self._on_loop(self._read_store(self._digests[name])) for name in message["names"]]

    def raw(self, message: dict[str, Any]) -> list[float]:
        """Seconds to read the same number of bytes off a bare server, once for each name."""
        return [self._on_loop(self._read_raw()) for _ in message["names"]]

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """A workload whose adapters come from the store; they are cold again after it."""
        workload = message["workload"]
        engine = self._ready()
        answers = []
        for item in workload["items"]:
            digest = self._digests[item["adapter"]]
            answers.append(_answer(engine, digest, item["prompt"], workload["output_tokens"]))
            _evict(engine, digest)
        return {"tokens": answers}

    def _ready(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("load comes first")
        return self._engine

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS * 5)

    async def _connect(self, target: str) -> GrpcAdapterSource:
        channel = open_channel(target)
        self._store = store_pb2_grpc.StoreServiceStub(channel)
        return GrpcAdapterSource(channel, SourceConfig(), no_tracing().tracer)

    async def _connect_raw(self, port: int) -> Any:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return channel.unary_stream(f"/{SERVICE}/{METHOD}")

    def _load_cold(self, digest: str) -> float:
        done: Future[float] = Future()
        start = time.perf_counter()

        def on_done(error: BaseException | None) -> None:
            if error is None:
                done.set_result(time.perf_counter() - start)
            else:
                done.set_exception(error)

        self._ready().load(digest, Tier.DEVICE, pin=False, on_done=on_done)
        return done.result(_CALL_SECONDS)

    async def _read_store(self, digest: str) -> float:
        start = time.perf_counter()
        call = self._store.FetchAdapter(store_pb2.FetchAdapterRequest(digest=digest), timeout=_CALL_SECONDS)
        async for _ in call:
            pass
        return time.perf_counter() - start

    async def _read_raw(self) -> float:
        start = time.perf_counter()
        async for _ in self._raw(b"", timeout=_CALL_SECONDS):
            pass
        return time.perf_counter() - start


def _answer(engine: Engine, digest: str, prompt: list[int], count: int) -> list[int]:
    """One request, served by the engine's own thread."""
    heard = Heard(time.perf_counter())
    engine.submit(make_request("cold", digest, prompt, count), heard)
    if not heard.ended.wait(_CALL_SECONDS):
        raise TimeoutError(f"no answer: {engine.status()}")
    if heard.error is not None:
        raise heard.error
    return heard.tokens


def _evict(engine: Engine, digest: str) -> None:
    """Makes an adapter cold; its last user may need a moment to let go of it."""
    deadline = time.monotonic() + _EVICT_SECONDS
    while True:
        try:
            engine.evict(digest)
            return
        except MeshError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.001)


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        peer = StorePeer(stack)
        serve({"load": peer.load, "run": peer.run, "cold": peer.cold, "stream": peer.stream, "raw": peer.raw})
