import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adaptermesh.api.store.v1 import store_pb2
from adaptermesh.cli.app import build_app
from adaptermesh.store.access.authentication import AuthenticationConfig
from adaptermesh.store.stores import StoreConfig
from tests.unit.client.fake_services import (
    FakeGateway,
    FakeRouter,
    FakeStore,
    FakeWorker,
    fake_router,
    fake_store,
    fake_worker,
    serve,
)
from tests.unit.store.conftest import (
    BASE_NAME,
    base_model,
    make_files,
    running_store,
    store_config,
)


@dataclass
class FakeMesh:
    """The four services on another thread's event loop; commands run their own."""

    store: FakeStore
    gateway: FakeGateway
    worker: FakeWorker
    router: FakeRouter
    addresses: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMesh]:
    """A mesh that the environment points at."""
    ready = threading.Event()
    found: list[FakeMesh] = []
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def run() -> None:
        mesh = FakeMesh(fake_store(), FakeGateway(), fake_worker(), fake_router([]))
        async with AsyncExitStack() as stack:
            for name, servicer in (("store", mesh.store), ("gateway", mesh.gateway), ("worker", mesh.worker)):
                mesh.addresses[name] = await stack.enter_async_context(serve(servicer))
            mesh.router.workers = [mesh.addresses["worker"]]
            mesh.addresses["router"] = await stack.enter_async_context(serve(mesh.router))
            found.append(mesh)
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(30)
    for name in ("store", "gateway", "router"):
        monkeypatch.setenv(f"ADAPTERMESH_{name.upper()}", found[0].addresses[name])
    yield found[0]
    loop.call_soon_threadsafe(stopping.set)
    thread.join(30)
    loop.close()


Invoke = Callable[..., Result]
Publish = Callable[..., str]


@pytest.fixture
def publish(real_store: Path, invoke: "Invoke", tmp_path: Path) -> Publish:
    """Uploads a small adapter to the real store and returns its ref."""

    def upload(name: str = "acme/ner", seed: int = 1, card: str | None = None, **config: Any) -> str:
        folder = tmp_path / f"{name.replace('/', '-')}-{seed}"
        folder.mkdir(exist_ok=True)
        rank = config.pop("rank", 2)
        for path, data in make_files(seed, rank, **config).items():
            (folder / path).write_bytes(data)
        if card is not None:
            (folder / "README.md").write_text(card)
        options = ("--base", BASE_NAME, "--license", "mit", "--json")
        result = invoke("adapters", "upload", str(folder), name, *options)
        return str(document(result)["version"]["ref"])

    return upload


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Runs a command; nothing but the test's own home is looked at."""
    monkeypatch.setenv("ADAPTERMESH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(build_app(), arguments, **options)

    return run


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


ROOT_KEY = "root-" + "r" * 40


@pytest.fixture
def real_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder of a store with one base, on another thread's event loop; the environment points at it."""
    with _store_on_a_thread(store_config(tmp_path / "store")) as target:
        monkeypatch.setenv("ADAPTERMESH_STORE", target)
        yield tmp_path / "store"


@pytest.fixture
def keyed_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The same, but it asks for API keys; the environment has the root key."""
    authentication = AuthenticationConfig(required=True, root_key=ROOT_KEY)
    config = dataclasses.replace(store_config(tmp_path / "store"), authentication=authentication)
    with _store_on_a_thread(config) as target:
        monkeypatch.setenv("ADAPTERMESH_STORE", target)
        monkeypatch.setenv("ADAPTERMESH_API_KEY", ROOT_KEY)
        yield tmp_path / "store"


@contextmanager
def _store_on_a_thread(config: StoreConfig) -> Iterator[str]:
    ready, stopping = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    found: list[str] = []

    async def run() -> None:
        async with running_store(config) as store:
            await store.stub.RegisterBaseModel(
                store_pb2.RegisterBaseModelRequest(base_model=base_model()),
                metadata=(("authorization", f"Bearer {ROOT_KEY}"),),
            )
            found.append(store.target)
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(stopping.set)
    thread.join(30)
    loop.close()


def document(result: Result) -> Any:
    """The one JSON document that a command printed."""
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)
