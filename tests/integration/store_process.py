"""A real store process over a home folder and, if it is given one, a bucket; and what is uploaded to it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from safetensors.numpy import save

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.rpc.channel import open_channel
from tests.s3_server import BUCKET, S3Server

HIDDEN = 512
LAYERS = 8
RANK = 32
PIECE = 64 * 1024
START_SECONDS = 60.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": 64,
}


def base_model() -> adapter_pb2.BaseModel:
    facts = BaseFacts.from_config("tiny", CONFIG, digest_bytes(b"weights"))
    return adapter_pb2.BaseModel(
        model_id="tiny",
        digest=facts.digest,
        config_digest=facts.config_digest,
        weights_digest=facts.weights_digest,
        architecture=facts.architecture,
        hidden_size=facts.hidden_size,
        num_layers=facts.num_layers,
        vocab_size=facts.vocab_size,
        config_json=json.dumps(CONFIG),
    )


def adapter_files(seed: int, rank: int = RANK, modules: tuple[str, ...] = ("q_proj",)) -> dict[str, bytes]:
    """4 KiB of tensors for each layer, module and unit of rank."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{path}.lora_A.weight"] = random.standard_normal((rank, HIDDEN), np.float32)
            tensors[f"{path}.lora_B.weight"] = random.standard_normal((HIDDEN, rank), np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": modules, "bias": "none"}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def large_files(seed: int, size: int = 9 * 2**20) -> dict[str, bytes]:
    """With one file that S3 takes in parts."""
    words = np.random.default_rng(seed).bytes(size // 2).hex()
    return {**adapter_files(seed), "vocab.txt": words.encode()}


@dataclass(frozen=True)
class Place:
    """What outlives a store process: its home, and where its blobs are."""

    home: Path
    s3: S3Server | None = None
    prefix: str = ""
    database_url: str = ""
    """Empty: the catalogue is in the home."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the store, without their prefix."""

    @classmethod
    def new(cls, home: Path, s3: S3Server | None = None) -> "Place":
        return cls(home, s3, uuid.uuid4().hex)

    @property
    def catalogue(self) -> str:
        """The URL under which another store finds the same catalogue."""
        return f"sqlite+aiosqlite:///{self.home}/store/catalogue.db"

    @property
    def staging(self) -> Path:
        return self.home / "store" / "staging"

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ADAPTERMESH_HOME": str(self.home),
            "ADAPTERMESH_STORE_PORT": "0",
            "ADAPTERMESH_STORE_DATABASE_URL": self.database_url,
            "ADAPTERMESH_LOG_JSON": "true",
            "ADAPTERMESH_TRACES": "",
            **{f"ADAPTERMESH_STORE_{name}": value for name, value in self.settings.items()},
            **(self.s3.environment(self.prefix) if self.s3 is not None else {}),
        }

    def blobs(self) -> set[str]:
        """The digits of their digests; blocks."""
        if self.s3 is None:
            files = (path for path in (self.home / "store" / "blobs").rglob("*") if path.is_file())
            return {f"{path.parent.name}{path.name}" for path in files}
        objects = self.s3.client().list_objects(BUCKET, prefix=f"{self.prefix}/", recursive=True)
        return {str(entry.object_name).split("sha256/")[1].replace("/", "") for entry in objects}


@dataclass
class StoreProcess:
    """`python -m adaptermesh.store`."""

    place: Place
    process: subprocess.Popen[bytes]
    channel: grpc.aio.Channel
    stub: "store_pb2_grpc.StoreServiceAsyncStub"

    @classmethod
    async def start(cls, place: Place) -> "StoreProcess":
        process, port = await asyncio.to_thread(launch, place)
        channel = open_channel(f"127.0.0.1:{port}")
        return cls(place, process, channel, store_pb2_grpc.StoreServiceStub(channel))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    async def gone(self) -> None:
        await self.channel.close()
        await asyncio.to_thread(self.process.wait, 30)

    async def versions(self) -> list[adapter_pb2.Version]:
        found: list[adapter_pb2.Version] = []
        async for part in self.stub.GetSnapshot(store_pb2.GetSnapshotRequest()):
            found += part.versions
        return found

    async def register(self) -> None:
        await self.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))

    async def collect(self) -> store_pb2.CollectGarbageResponse:
        """Without any grace."""
        return await self.stub.CollectGarbage(store_pb2.CollectGarbageRequest(grace=Duration()))


def launch(place: Place) -> tuple[subprocess.Popen[bytes], int]:
    """A process and its port, when it serves; blocks."""
    place.home.mkdir(exist_ok=True)
    log = place.home / f"store-{uuid.uuid4().hex}.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "adaptermesh.store"]
        process = subprocess.Popen(command, env=place.environment(), stderr=file)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        entries = [
            json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")
        ]
        for entry in entries:
            if "serving" in entry.values():
                return process, int(entry["port"])
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"the store did not start:\n{log.read_text()}")


def upload_header(name: str, files: dict[str, bytes]) -> store_pb2.UploadHeader:
    sources = [
        adapter_pb2.SourceFile(path=path, size_bytes=len(data), digest=digest_bytes(data))
        for path, data in files.items()
    ]
    return store_pb2.UploadHeader(namespace="acme", name=name, base_model="tiny", files=sources)


async def upload_messages(
    name: str, files: dict[str, bytes], stop_after: int | None = None
) -> AsyncIterator[store_pb2.UploadAdapterRequest]:
    """All messages of an upload; stops for ever after so many of them."""
    messages = [store_pb2.UploadAdapterRequest(header=upload_header(name, files))]
    for data in files.values():
        pieces = (data[start : start + PIECE] for start in range(0, len(data), PIECE))
        messages += [store_pb2.UploadAdapterRequest(data=piece) for piece in pieces]
    for message in messages[:stop_after]:
        yield message
    if stop_after is not None:
        await asyncio.Event().wait()


async def assert_whole(
    store: StoreProcess, version: adapter_pb2.Version, files: dict[str, bytes]
) -> set[str]:
    """Reads back everything of a version; returns the blobs that it needs."""
    needed = {version.digest}
    for source in version.source_files:
        request = store_pb2.DownloadFileRequest(digest=version.digest, path=source.path)
        data = b"".join([part.data async for part in store.stub.DownloadFile(request)])
        assert data == files[source.path]
        needed.add(source.digest)
    messages = [
        message
        async for message in store.stub.FetchAdapter(store_pb2.FetchAdapterRequest(digest=version.digest))
    ]
    tensors = b"".join(message.data for message in messages[1:])
    manifest = Manifest.from_bytes(messages[0].manifest)
    assert digest_bytes(messages[0].manifest) == version.digest
    for chunk in manifest.chunks:
        assert digest_bytes(tensors[chunk.offset : chunk.offset + chunk.size]) == chunk.sha256
    return {digest.removeprefix("sha256:") for digest in needed | {digest_bytes(tensors)}}
