"""The memory of a store process while many large uploads and downloads run together."""

import asyncio
import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.bench import Bench
from tests.bench.figures import Figure, Spread
from tests.bench.peers import transfer_client
from tests.bench.peers.store_process import register, running_store
from tests.bench.peers.transfer_client import Job
from tests.bench.result import Lane, Result
from tests.s3_server import s3_server

_MIB = 2**20
_PREFIX = "memory"
_PROCESSES = 5
"""In which the SDK runs, for each direction."""
_MOST_MIB = 64.0


def run(bench: Bench) -> Result:
    size_bytes, at_once = bench.scale.transfer_bytes, bench.scale.transfers
    growth: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptermesh-bench-")))
        server = stack.enter_context(s3_server(home / "server"))
        backends = {"folder": {}, "S3": server.environment(_PREFIX)}
        for backend, settings in backends.items():
            (home / backend).mkdir()
            store = stack.enter_context(running_store(home / backend, settings))
            asyncio.run(register(store.target, transfer_client.base_facts()))
            # What one transfer of each kind brings is there once: code, threads, connections.
            _wave(store.target, size_bytes, [("upload", 1, 1)])
            _wave(store.target, size_bytes, [("download", 1, 1)])
            for number in bench.rounds():
                before = store.memory_bytes()
                store.forget_peak()
                shares = list(_shares(at_once, 1000 * (number + 1)))
                seconds = _wave(store.target, size_bytes, shares)
                grown = (store.peak_bytes() - before) / _MIB
                growth.setdefault(backend, []).append(grown)
                rates.setdefault(backend, []).append(2 * at_once * size_bytes / 1e6 / seconds)
                print(
                    f"  {backend}, {number + 1}: {before / _MIB:.0f} + {grown:.0f} MiB, {seconds:.0f} s",
                    flush=True,
                )
    return Result(
        figures=tuple(
            Figure(
                f"{2 * at_once} transfers at once, {backend}: memory that they add",
                Spread.of(values),
                _MOST_MIB,
                at_most=True,
                unit="MiB",
            )
            for backend, values in growth.items()
        ),
        lanes=tuple(
            Lane(f"{backend}: both directions together", "MB/s", tuple(values))
            for backend, values in rates.items()
        ),
    )


def _shares(at_once: int, first_seed: int) -> Iterator[tuple[str, int, int]]:
    """Kind, count and seed of each process."""
    processes = min(_PROCESSES, at_once)
    for index in range(processes):
        count = len(range(index, at_once, processes))
        yield "upload", count, first_seed + at_once * index
        yield "download", count, 1


def _wave(target: str, size_bytes: int, shares: Sequence[tuple[str, int, int]]) -> float:
    """Runs transfers in processes of their own; seconds from the moment that all are ready."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(transfer_client.running(Job(kind, target, size_bytes, count, seed)))
            for kind, count, seed in shares
        ]
        for process in processes:
            _expect(process, "ready")
        start = time.perf_counter()
        for process in processes:
            _begin(process)
        for process in processes:
            _expect(process, "done")
        return time.perf_counter() - start


def _begin(process: "subprocess.Popen[str]") -> None:
    if process.stdin is None:
        raise RuntimeError("the client has no stdin")
    process.stdin.write("begin\n")
    process.stdin.flush()


def _expect(process: "subprocess.Popen[str]", word: str) -> None:
    found = "" if process.stdout is None else process.stdout.readline().strip()
    if found != word:
        raise RuntimeError(f"a client said {found!r}, not {word!r}")
