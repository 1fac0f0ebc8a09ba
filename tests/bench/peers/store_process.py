"""A real adapter store as a process, with its data in a folder of its own."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.client import Publication, StoreClient, Version
from adaptermesh.local.ports import free_ports
from adaptermesh.local.settings import child_environment
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.probe import probe
from adaptermesh.worker.registration import register_within

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_CALL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RunningStore:
    """A store that serves."""

    target: str
    """host:port"""
    process_id: int

    def memory_bytes(self) -> int:
        """What it has in memory now."""
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """The most that it had since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """See proc(5), /proc/pid/clear_refs."""
        Path(f"/proc/{self.process_id}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """User and system time that it has taken."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.process_id}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@contextlib.contextmanager
def run_store(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Gives the host:port of a store that serves; stops it at the end."""
    with running_store(home, settings) as store:
        yield store.target


@contextlib.contextmanager
def running_store(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[RunningStore]:
    """A store that serves; stops it at the end."""
    (port,) = free_ports(1, random.Random())
    environment = child_environment(
        {
            "ADAPTERMESH_HOME": str(home),
            "ADAPTERMESH_STORE_PORT": str(port),
            "ADAPTERMESH_TRACES": "",
            **(settings or {}),
        }
    )
    with (home / "store.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "adaptermesh.store"], env=environment, stdout=log, stderr=log
        )
    try:
        _wait_until_serving(f"127.0.0.1:{port}", process, home / "store.log")
        yield RunningStore(f"127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def register(target: str, facts: BaseFacts) -> None:
    """Makes a base known to a store."""
    channel = open_channel(target)
    await register_within(channel, facts, _CALL_SECONDS)
    await channel.close()


async def publish(target: str, facts: BaseFacts, adapters: Path, names: Sequence[str]) -> list[Version]:
    """Uploads adapters to a store that then knows their base."""
    await register(target, facts)
    async with StoreClient(target) as store:
        publication = Publication(facts.model_id)
        results = [
            await store.upload(adapters / name / "peft", f"bench/{name}", publication) for name in names
        ]
    return [result.version for result in results]


def _wait_until_serving(target: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while wrong := probe(target):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the store does not serve: {wrong}\n{log.read_text(errors='replace')[-2000:]}"
            )
        time.sleep(0.1)
