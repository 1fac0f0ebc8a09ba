import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adaptermesh.api.worker.v1 import worker_pb2, worker_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.errors import Code, Reason
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.service import ServiceContext, run
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.telemetry.tracing import no_tracing
from adaptermesh.worker.service import WorkerService
from adaptermesh.worker.settings import WorkerSettings
from tests.unit.worker.conftest import StartWorker, Worker, read_all
from tests.unit.worker.fake_peers import FakeStore, serve_store, until


async def opened(worker: Worker, request_id: str) -> Any:
    call = worker.stub.Generate(worker.request(request_id))
    started = await call.read()
    assert isinstance(started, worker_pb2.GenerateResponse)
    return call


async def test_the_base_model_is_registered_at_the_store(worker: Worker) -> None:
    await until(lambda: len(worker.store.registered) == 1)
    registered = worker.store.registered[0].base_model
    assert registered.digest == worker.base.digest
    assert registered.config_digest == worker.base.config_digest
    assert registered.vocab_size == worker.base.vocab_size


async def test_a_worker_serves_while_the_store_is_away_and_registers_when_it_comes(
    start_worker: StartWorker,
) -> None:
    gone, port = await serve_store(FakeStore())  # type: ignore[abstract]
    await gone.stop(0)
    worker = await start_worker(store_address=f"127.0.0.1:{port}")
    call = await opened(worker, "r1")
    worker.engine.finish("r1")
    assert (await read_all(call))[-1].HasField("finished")
    late = FakeStore()  # type: ignore[abstract]
    server, _ = await serve_store(late, port)
    await until(lambda: len(late.registered) == 1)
    await server.stop(0)


async def test_routers_hear_of_the_worker(worker: Worker) -> None:
    await until(lambda: len(worker.router.snapshots()) == 1)
    info = worker.router.snapshots()[0].info
    assert info == (await worker.stub.GetStatus(worker_pb2.GetStatusRequest())).info


async def test_requests_are_reported_as_admitted_and_later_as_gone(worker: Worker) -> None:
    await until(lambda: len(worker.router.last) >= 1)
    call = await opened(worker, "r1")
    await until(lambda: any("r1" in d.admitted_request_ids for d in worker.router.deltas()))
    worker.router.want_snapshot = True
    await until(lambda: len(worker.router.snapshots()) == 2)
    assert list(worker.router.snapshots()[1].request_ids) == ["r1"]
    worker.engine.finish("r1")
    await read_all(call)
    worker.router.want_snapshot = True
    await until(lambda: len(worker.router.snapshots()) == 3)
    assert list(worker.router.snapshots()[2].request_ids) == []


async def test_a_draining_worker_finishes_what_runs_and_refuses_the_rest(worker: Worker) -> None:
    call = await opened(worker, "r1")
    draining = asyncio.create_task(worker.service.drain())
    await until(lambda: any(d.state == worker_pb2.WORKER_STATE_DRAINING for d in worker.router.deltas()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(worker.stub.Generate(worker.request("r2")))
    error = mesh_error_from(caught.value)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.DRAINING)
    assert error.retry_after is not None
    status = await worker.stub.GetStatus(worker_pb2.GetStatusRequest())
    assert status.state == worker_pb2.WORKER_STATE_DRAINING
    assert not draining.done()
    worker.engine.tokens("r1", "done", 1)
    worker.engine.finish("r1")
    messages = await read_all(call)
    assert messages[-1].HasField("finished")
    await draining


async def test_what_does_not_end_within_the_drain_time_ends_with_a_typed_status(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(drain_seconds=0.05)
    call = await opened(worker, "r1")
    worker.engine.tokens("r1", "half", 1)
    await worker.service.drain()
    texts = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            texts.append((await call.read()).delta.text)
    error = mesh_error_from(caught.value)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.DRAINING)
    assert error.metadata["request_id"] == "r1"
    assert texts == ["half"]
    assert worker.engine.cancelled == ["r1"]


async def test_an_engine_that_fails_again_and_again_takes_the_worker_out_of_service(worker: Worker) -> None:
    await worker.server.set_serving(True)
    worker.engine.healthy = False
    await until(lambda: any(d.state == worker_pb2.WORKER_STATE_DRAINING for d in worker.router.deltas()))
    async with open_channel(f"127.0.0.1:{worker.port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        while (await watching.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass


async def test_stopping_ends_the_engine_and_the_reports(worker: Worker) -> None:
    await until(lambda: len(worker.router.last) >= 1)
    await worker.service.stop()
    assert worker.engine.started
    assert worker.engine.stopped
    await until(lambda: worker.router.ended == 1)


async def test_a_worker_with_dummy_weights_needs_a_folder_with_a_config_only(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    worker = await start_worker(load_format="dummy", model=str(folder))
    assert worker.engine.started


async def test_calls_are_refused_until_the_model_is_loaded(home: Path) -> None:
    settings = WorkerSettings(home=home, port=0, model="tiny")
    server = MeshServer("adaptermesh.api.worker.v1.WorkerService", ServerConfig(), no_tracing())
    service = WorkerService(ServiceContext(settings, no_tracing(), SystemClock(), server))
    service.register(server)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest())
    error = mesh_error_from(caught.value)
    assert (error.code, error.retry_after) == (Code.UNAVAILABLE, 1.0)
    await service.drain()
    await service.stop()
    await server.stop(0)


def test_a_missing_model_says_which_command_fetches_it_and_exits_with_2(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings(home=home, port=0, model="absent", traces="")
    code = run("worker", "adaptermesh.api.worker.v1.WorkerService", settings, WorkerService)
    printed = capsys.readouterr().err
    assert code == 2
    assert "adaptermesh models pull absent" in printed
    assert "Traceback" not in printed


def test_the_engine_gets_the_limits_that_were_set(tmp_path: Path, base: BaseFacts) -> None:
    settings = WorkerSettings(home=tmp_path, max_batch_rows=3, device_slots=2, kv_tokens=128, max_waiting=5)
    config = settings.engine_config(7712)
    assert (config.max_batch_rows, config.device_slots, config.kv_tokens, config.max_waiting) == (
        3,
        2,
        128,
        5,
    )
    assert config.disk_dir == tmp_path / "workers" / "7712" / "adapters"
    assert config.prefix_cache
    assert not WorkerSettings(home=tmp_path, prefix_cache=False).engine_config(7712).prefix_cache


def test_routers_are_a_list(tmp_path: Path) -> None:
    settings = WorkerSettings(home=tmp_path, routers="one:1, two:2,")
    assert settings.reporter_config().routers == ("one:1", "two:2")


def test_every_setting_says_what_it_means() -> None:
    assert all(field.description for field in WorkerSettings.model_fields.values())
