"""kill -9 of a real store process at many points of an upload."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes
from adaptermesh.rpc.channel import open_channel
from adaptermesh.testing.polling import eventually

HIDDEN = 512
LAYERS = 8
RANK = 32
PIECE = 64 * 1024
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


def adapter_files(seed: int) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = random.standard_normal((RANK, HIDDEN)).astype(np.float32)
        tensors[f"{path}.lora_B.weight"] = random.standard_normal((HIDDEN, RANK)).astype(np.float32)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


@dataclass
class StoreProcess:
    """`python -m adaptermesh.store` over a home folder."""

    home: Path
    process: subprocess.Popen[bytes]
    channel: grpc.aio.Channel
    stub: "store_pb2_grpc.StoreServiceAsyncStub"

    @classmethod
    async def start(cls, home: Path, **settings: str) -> "StoreProcess":
        environment = {
            **os.environ,
            "ADAPTERMESH_HOME": str(home),
            "ADAPTERMESH_STORE_PORT": "0",
            "ADAPTERMESH_LOG_JSON": "true",
            "ADAPTERMESH_TRACES": "",
            **{f"ADAPTERMESH_STORE_{name.upper()}": value for name, value in settings.items()},
        }
        process, log = await asyncio.to_thread(launch, environment, home / "store.log")
        port = await eventually(lambda: serving_port(process, log))
        channel = open_channel(f"127.0.0.1:{port}")
        return cls(home, process, channel, store_pb2_grpc.StoreServiceStub(channel))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    async def gone(self) -> None:
        await self.channel.close()
        await asyncio.to_thread(self.process.wait, timeout=30)

    @property
    def staging(self) -> Path:
        return self.home / "store" / "staging"

    def blobs(self) -> set[str]:
        files = (path for path in (self.home / "store" / "blobs").rglob("*") if path.is_file())
        return {f"{path.parent.name}{path.name}" for path in files}

    async def versions(self) -> list[adapter_pb2.Version]:
        found: list[adapter_pb2.Version] = []
        async for part in self.stub.GetSnapshot(store_pb2.GetSnapshotRequest()):
            found += part.versions
        return found


def launch(environment: dict[str, str], path: Path) -> tuple[subprocess.Popen[bytes], TextIO]:
    """Returns the process and its log, of which nothing was read yet."""
    command = [sys.executable, "-m", "adaptermesh.store"]
    path.parent.mkdir(exist_ok=True)
    # A pipe would stop the store once it is full.
    with path.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    return process, path.open(encoding="utf-8")


async def serving_port(process: subprocess.Popen[bytes], log: TextIO) -> int:
    """0 until the log says that the store serves."""
    log.seek(0)
    lines = log.read().splitlines(keepends=True)
    for line in lines:
        entry = json.loads(line) if line.endswith("\n") else {}
        if "serving" in entry.values():
            log.close()
            return int(entry["port"])
    if process.poll() is not None:
        pytest.fail(f"the store did not start:\n{''.join(lines)}")
    return 0


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


@dataclass(frozen=True)
class KillPoint:
    """When to kill: the upload has stopped after so many messages, or goes on to its end (None)."""

    name: str
    reached: Callable[[StoreProcess, set[str]], Any]
    stop_after: int | None = None


POINTS = (
    KillPoint("header", lambda store, _: list(store.staging.glob("*/source-000")), 1),
    KillPoint("half", lambda store, _: sizes(store.staging, "source-001") >= 4 * PIECE, 12),
    KillPoint("all-but-the-end", lambda store, _: sizes(store.staging, "source-001") >= 14 * PIECE, -1),
    KillPoint("received", lambda store, _: list(store.staging.glob("*/canonical.safetensors"))),
    KillPoint("checked", lambda store, _: list(store.staging.glob("*/manifest.json"))),
    KillPoint("keeping", lambda store, _: list(store.staging.glob("*/intended-blobs"))),
    KillPoint("kept-one", lambda store, before: store.blobs() - before),
    KillPoint("never", lambda _store, _before: False),
)


def sizes(staging: Path, name: str) -> int:
    return sum(path.stat().st_size for path in staging.glob(f"*/{name}"))


def kill_when(store: StoreProcess, point: KillPoint, before: set[str], uploaded: Callable[[], bool]) -> None:
    """Kills the store when the point is reached, or after the upload if it was too quick to be seen."""
    deadline = time.monotonic() + 30
    while not uploaded() and time.monotonic() < deadline:
        try:
            if point.reached(store, before):
                break
        except FileNotFoundError:
            # The store moves files while they are listed.
            continue
    store.kill()


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


async def upload_and_kill(store: StoreProcess, point: KillPoint, files: dict[str, bytes]) -> bool:
    """Returns whether the upload was acknowledged."""
    before = store.blobs()
    call = store.stub.UploadAdapter(upload_messages(point.name, files, point.stop_after))
    uploading = asyncio.ensure_future(call)
    await asyncio.to_thread(kill_when, store, point, before, uploading.done)
    outcome = (await asyncio.gather(uploading, return_exceptions=True))[0]
    await store.gone()
    return isinstance(outcome, store_pb2.UploadAdapterResponse)


async def test_kill_9_during_an_upload_leaves_no_half_version_and_a_repetition_works(tmp_path: Path) -> None:
    store = await StoreProcess.start(tmp_path)
    try:
        await store.stub.RegisterBaseModel(store_pb2.RegisterBaseModelRequest(base_model=base_model()))
        needed: set[str] = set()
        for seed, point in enumerate(POINTS):
            files = adapter_files(seed)
            acknowledged = await upload_and_kill(store, point, files)
            store = await StoreProcess.start(tmp_path)
            found = [version for version in await store.versions() if version.name == point.name]
            assert len(found) <= 1
            assert found or not acknowledged, point.name
            for version in found:
                needed |= await assert_whole(store, version, files)
            assert list(store.staging.iterdir()) == [], point.name
            assert store.blobs() == needed, point.name
            again = await store.stub.UploadAdapter(upload_messages(point.name, files))
            assert (again.version.number, again.created) == (1, not found), point.name
            needed |= await assert_whole(store, again.version, files)
        assert [version.name for version in await store.versions()] == [point.name for point in POINTS]
    finally:
        store.kill()
        await store.gone()


async def test_sigterm_ends_the_store_cleanly_with_watchers_connected(tmp_path: Path) -> None:
    store = await StoreProcess.start(tmp_path)
    parts = [part async for part in store.stub.GetSnapshot(store_pb2.GetSnapshotRequest())]
    watch = store.stub.WatchChanges(store_pb2.WatchChangesRequest(feed_id=parts[0].feed_id))
    await watch.read()
    store.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await watch.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await store.gone()
    assert store.process.returncode == 0
