"""A gRPC server with nothing behind it: gives the bytes of one file from memory. Prints its port."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

PIECE_BYTES = 512 * 1024
METHOD = "Stream"
UNARY = "Whole"
SERVICE = "adaptermesh.bench.Raw"


@contextlib.contextmanager
def run_raw_server(file: Path) -> Iterator[int]:
    """Gives the port of a process that serves a file; it ends with the block."""
    command = [sys.executable, "-m", "tests.bench.peers.raw_server", str(file)]
    # Leaving the process's block closes its stdin, which ends it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("the bare server has no stdout")
        yield int(process.stdout.readline())


async def run(file: Path) -> None:
    """Serves until stdin ends, which is when the parent has gone."""
    data = await asyncio.to_thread(file.read_bytes)
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]

    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def whole(request: bytes, context: object) -> bytes:
        return data

    server = grpc.aio.server()
    handlers: Any = {
        METHOD: grpc.unary_stream_rpc_method_handler(stream),
        UNARY: grpc.unary_unary_rpc_method_handler(whole),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
