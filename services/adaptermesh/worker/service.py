"""The worker as a service: loads the base model, wires the parts together, drains and stops them."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import Clock
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.worker.backend import Backend
from adaptermesh.worker.composing_source import ComposingSource
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.source import AdapterSource
from adaptermesh.worker.generation import Generations
from adaptermesh.worker.identity import advertised_address, new_worker_id
from adaptermesh.worker.models.cache import ModelCache
from adaptermesh.worker.prompts import PromptEncoder, Tokenizer
from adaptermesh.worker.registration import keep_registered, register_within
from adaptermesh.worker.reporter import Reporter
from adaptermesh.worker.residency import StatusBoard
from adaptermesh.worker.servicer import Serving, WorkerServicer
from adaptermesh.worker.settings import WorkerSettings
from adaptermesh.worker.source import GrpcAdapterSource
from adaptermesh.worker.spans import RequestSpans
from adaptermesh.worker.wire import base_model_message

log = logging.getLogger(__name__)

_ABORT_SECONDS = 2.0
"""After the drain's end: for the streams that were cut off to deliver their status."""
_RESTART_SECONDS = 1.0
_HEALTH_SECONDS = 1.0
_ENCODER_THREADS = 2


@dataclass(frozen=True, slots=True)
class LoadedBackend:
    """A base model that can serve."""

    backend: Backend
    base: BaseFacts
    tokenizer: Tokenizer
    max_context_tokens: int
    base_bytes: int = 0


BackendLoader = Callable[[Path, EngineConfig, AdapterSource, Clock], LoadedBackend]


def load_native(folder: Path, config: EngineConfig, source: AdapterSource, clock: Clock) -> LoadedBackend:
    """Loads a base model into the native engine; takes seconds."""
    # torch comes with these imports: the port is bound and the health check answers before that.
    from adaptermesh.worker.engine.base import load_base
    from adaptermesh.worker.engine.engine import Engine

    base = load_base(folder, config)
    # Before the engine packs them in its own way.
    size = base.weight_bytes
    engine = Engine(config, base, source, clock)
    return LoadedBackend(engine, base.facts, base.tokenizer, engine.max_context_tokens, size)


class WorkerService:
    """One worker process's parts, from the first to the last."""

    def __init__(self, context: ServiceContext[WorkerSettings], load: BackendLoader = load_native) -> None:
        self._context = context
        self._settings = context.settings
        self._load = load
        self._servicer = WorkerServicer()
        self._channel: grpc.aio.Channel | None = None
        self._source: GrpcAdapterSource | None = None
        self._composing: ComposingSource | None = None
        self._serving: Serving | None = None
        self._background: asyncio.Task[None] | None = None
        self._encoders = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="prompt")
        # A missing model is said before the port is bound.
        cache, name = ModelCache(context.settings.home, context.clock), context.settings.model
        dummy = context.settings.load_format == "dummy"
        self._folder = cache.locate_config(name) if dummy else cache.locate(name).folder

    def register(self, server: MeshServer) -> None:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._servicer, server.grpc)

    async def start(self) -> None:
        """Loads the model and takes requests; the store and the routers may be away."""
        settings, tracer = self._settings, self._context.tracing.tracer
        self._channel = open_channel(settings.store, settings.store_key.get_secret_value())
        self._source = GrpcAdapterSource(self._channel, settings.source_config(), tracer)
        config = settings.engine_config(self._context.port)
        source = self._composing = ComposingSource(self._source, tracer)
        loaded = await asyncio.to_thread(self._load, self._folder, config, source, self._context.clock)
        info = self._info(loaded, config)
        board = StatusBoard(loaded.backend.status)
        encoder = PromptEncoder(
            loaded.tokenizer, loaded.base.vocab_size, loaded.max_context_tokens, self._encoders
        )
        spans = RequestSpans(tracer, info.worker_id, source.span_of)
        self._serving = Serving(
            info=info,
            backend=loaded.backend,
            board=board,
            generations=Generations(
                loaded.backend,
                encoder,
                board,
                spans,
                loaded.base.digest,
                self._context.clock,
                source.learn,
            ),
            load_seconds=settings.fetch_timeout_seconds,
        )
        loaded.backend.set_change_callback(board.touch)
        loaded.backend.start()
        self._servicer.serve(self._serving)
        if not await register_within(self._channel, loaded.base, settings.registration_seconds):
            log.warning("serving although the store does not know the base model yet")
        reporter = Reporter(settings.reporter_config(), info, board)
        self._background = asyncio.create_task(
            self._keep_running(reporter, self._channel, loaded), name="reports and registration"
        )
        log.info("model loaded", extra={"worker_id": info.worker_id, "base_model": loaded.base.model_id})

    async def drain(self) -> None:
        """Refuses new requests, says so to the routers, and lets the running ones end within the time set."""
        if self._serving is None:
            return
        board = self._serving.board
        board.start_draining()
        if not await _idle_within(board, self._settings.drain_seconds):
            left = self._serving.generations.abort_all()
            log.warning("drain time is over", extra={"aborted_requests": left})
            await _idle_within(board, _ABORT_SECONDS)

    async def stop(self) -> None:
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)
        if self._serving is not None:
            await asyncio.to_thread(self._serving.backend.stop)
        if self._composing is not None:
            self._composing.stop()
        if self._source is not None:
            await self._source.stop()
        if self._channel is not None:
            await self._channel.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def _keep_running(
        self, reporter: Reporter, channel: grpc.aio.Channel, loaded: LoadedBackend
    ) -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(reporter.run())
                    group.create_task(keep_registered(channel, loaded.base))
                    group.create_task(self._watch_health(loaded.backend))
            except Exception:
                # The top of a task: a worker that no router hears of would serve nobody.
                log.exception("reports or registration failed, starting them again")
                await asyncio.sleep(_RESTART_SECONDS)

    async def _watch_health(self, backend: Backend) -> None:
        """Takes a worker that can't compute any more out of service; whoever supervises it starts another."""
        while backend.healthy:  # noqa: ASYNC110  # it is told by no event
            await asyncio.sleep(_HEALTH_SECONDS)
        log.critical("the engine fails again and again, taking nothing new")
        if self._serving is not None:
            self._serving.board.start_draining()
        await self._context.server.set_serving(False)
        await asyncio.Event().wait()

    def _info(self, loaded: LoadedBackend, config: EngineConfig) -> worker_pb2.WorkerInfo:
        address = advertised_address(self._settings.advertise, self._settings.host, self._context.port)
        return worker_pb2.WorkerInfo(
            worker_id=new_worker_id(address),
            address=address,
            device=config.device,
            base_model=base_model_message(loaded.base),
            device_slots=config.device_slots,
            max_batch_rows=config.max_batch_rows,
            max_context_tokens=loaded.max_context_tokens,
            max_waiting=config.max_waiting,
            base_bytes=loaded.base_bytes,
        )


async def _idle_within(board: StatusBoard, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await board.wait_idle()
    except TimeoutError:
        return False
    return True
