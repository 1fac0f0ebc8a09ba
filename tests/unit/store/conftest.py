"""A real store on loopback over a folder and a database of its own, and small adapters to put into it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save

from adaptermesh.api.access.v1 import access_pb2_grpc
from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import SystemClock
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.status import mesh_error_from
from adaptermesh.store.access.servicer import AccessServicer
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.store.service import GRPC_NAME
from adaptermesh.store.servicer import StoreServicer
from adaptermesh.store.stores import StoreConfig, Stores
from adaptermesh.telemetry.tracing import no_tracing
from adaptermesh.testing.polling import eventually

HIDDEN = 32
LAYERS = 3
BASE_NAME = "tiny-llama"
Files = Mapping[str, bytes]


def base_model(name: str = BASE_NAME, weights: str = "weights") -> adapter_pb2.BaseModel:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    facts = BaseFacts.from_config(name, config, digest_bytes(weights.encode()))
    return adapter_pb2.BaseModel(
        model_id=facts.model_id,
        digest=facts.digest,
        config_digest=facts.config_digest,
        weights_digest=facts.weights_digest,
        architecture=facts.architecture,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        config_json=json.dumps(config),
    )


def make_tensors(seed: int = 0, rank: int = 2, width: int = HIDDEN) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = random.standard_normal((rank, width)).astype(np.float32)
        tensors[f"{path}.lora_B.weight"] = random.standard_normal((HIDDEN, rank)).astype(np.float32)
    return tensors


def make_files(
    seed: int = 0,
    rank: int = 2,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    **config: object,
) -> dict[str, bytes]:
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/where",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        **config,
    }
    return {
        "adapter_config.json": json.dumps(values).encode(),
        "adapter_model.safetensors": save(make_tensors(seed, rank) if tensors is None else tensors),
        "README.md": b"# A small adapter\n\nMade for a test.\n",
    }


def make_header(files: Files, **fields: Any) -> store_pb2.UploadHeader:
    sources = [
        adapter_pb2.SourceFile(path=path, size_bytes=len(data), digest=digest_bytes(data))
        for path, data in files.items()
    ]
    values = {"namespace": "acme", "name": "ner", "base_model": BASE_NAME, "license": "mit", "files": sources}
    return store_pb2.UploadHeader(**{**values, **fields})


def make_requests(
    header: store_pb2.UploadHeader, files: Files, piece: int = 1000
) -> Iterator[store_pb2.UploadAdapterRequest]:
    yield store_pb2.UploadAdapterRequest(header=header)
    for data in files.values():
        for start in range(0, len(data), piece):
            yield store_pb2.UploadAdapterRequest(data=data[start : start + piece])


async def paced(
    messages: list[store_pb2.UploadAdapterRequest], pause_seconds: float
) -> AsyncIterator[store_pb2.UploadAdapterRequest]:
    for message in messages:
        yield message
        await asyncio.sleep(pause_seconds)


@dataclass
class RunningStore:
    """A store that answers on loopback."""

    stores: Stores
    config: StoreConfig
    stub: "store_pb2_grpc.StoreServiceAsyncStub"
    target: str

    async def upload(self, files: Files, piece: int = 1000, **fields: Any) -> store_pb2.UploadAdapterResponse:
        return await self.send(make_requests(make_header(files, **fields), files, piece))

    async def send(
        self, requests: Iterable[store_pb2.UploadAdapterRequest]
    ) -> store_pb2.UploadAdapterResponse:
        """Sends an upload; again, slower, if a refusal that crossed a message was lost (grpc/grpc#36066)."""
        messages = list(requests)
        for pause_seconds in (0.0, 0.02, 0.2):
            try:
                return await self.stub.UploadAdapter(paced(messages, pause_seconds))
            except grpc.aio.AioRpcError as error:
                lost = error
                if error.details() != "Internal error from Core":
                    raise
        raise lost

    async def snapshot(self) -> store_pb2.GetSnapshotResponse:
        """All parts in one message."""
        whole = store_pb2.GetSnapshotResponse()
        async for part in self.stub.GetSnapshot(store_pb2.GetSnapshotRequest()):
            whole.MergeFrom(part)
        return whole

    def left_files(self) -> list[str]:
        """What is in staging and among the blobs."""
        folders = (self.config.folder / "staging", self.config.folder / "blobs")
        return sorted(str(path) for folder in folders for path in folder.rglob("*") if path.is_file())


@asynccontextmanager
async def running_store(config: StoreConfig) -> AsyncIterator[RunningStore]:
    stores = Stores(config, SystemClock())
    server = MeshServer(GRPC_NAME, ServerConfig(), no_tracing())
    store_pb2_grpc.add_StoreServiceServicer_to_server(StoreServicer(stores), server.grpc)
    access_pb2_grpc.add_AccessServiceServicer_to_server(AccessServicer(stores), server.grpc)
    server.guard(stores.gatekeeper)
    port = await server.start()
    await stores.open()
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        yield RunningStore(stores, config, store_pb2_grpc.StoreServiceStub(channel), f"127.0.0.1:{port}")
    finally:
        await channel.close()
        stores.drain()
        await server.stop(grace=0)
        await stores.close()


@asynccontextmanager
async def refused() -> AsyncIterator[list[MeshError]]:
    """Expects a call to be refused; the list then has the error."""
    errors: list[MeshError] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield errors
    errors.append(mesh_error_from(caught.value))


async def until(true: Callable[[], Any]) -> None:
    """Waits, with a bound, for something that gives no event."""

    async def look() -> Any:
        return true()

    await eventually(look, within=20)


def store_config(folder: Path, database_url: str = "", s3: S3Config | None = None) -> StoreConfig:
    return StoreConfig(
        folder=folder,
        s3=s3,
        database=DatabaseConfig(url=database_url or f"sqlite+aiosqlite:///{folder}/catalogue.db"),
        feed=FeedConfig(heartbeat_seconds=0.2, page_size=4),
        lock_seconds=0.3,
    )


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions of this file: test modules can't import it."""
    return SimpleNamespace(
        until=until,
        base_model=base_model,
        make_files=make_files,
        make_header=make_header,
        make_requests=make_requests,
        make_tensors=make_tensors,
        refused=refused,
        running_store=running_store,
        replace=replace,
    )


@pytest.fixture
def config(tmp_path: Path, database_url: str) -> StoreConfig:
    return store_config(tmp_path, database_url)


@pytest.fixture(params=["folder", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    """A store of either backend."""
    s3 = request.getfixturevalue("s3_server").config() if request.param == "s3" else None
    return store_config(tmp_path, s3=s3)


@pytest.fixture(params=["sqlite-folder", "postgresql-s3"])
def both_forms(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    """A store as it is on one machine, and one that may have others beside it."""
    if request.param == "sqlite-folder":
        return store_config(tmp_path)
    url = request.getfixturevalue("postgres_url")
    return store_config(tmp_path, url, request.getfixturevalue("s3_server").config())


@pytest.fixture
async def empty_store(config: StoreConfig) -> AsyncIterator[RunningStore]:
    async with running_store(config) as store:
        yield store


@pytest.fixture
async def store(empty_store: RunningStore) -> RunningStore:
    """With one base model."""
    await empty_store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
    return empty_store


@pytest.fixture
def publish(store: RunningStore) -> Callable[..., Any]:
    """Uploads a number of different versions of one adapter."""

    async def upload(
        name: str = "ner", seeds: Sequence[int] = (1,), card: bytes = b"", **fields: Any
    ) -> list[Any]:
        more = {"README.md": card} if card else {}
        return [
            (await store.upload({**make_files(seed), **more}, name=name, **fields)).version for seed in seeds
        ]

    return upload
