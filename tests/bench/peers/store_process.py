"""A real adapter store as a process, with its data in a folder of its own."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def run_store(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Gives the host:port of a store that serves; stops it at the end."""
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
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def publish(target: str, facts: BaseFacts, adapters: Path, names: Sequence[str]) -> list[Version]:
    """Uploads adapters to a store that then knows their base."""
    channel = open_channel(target)
    await register_within(channel, facts, _CALL_SECONDS)
    await channel.close()
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
