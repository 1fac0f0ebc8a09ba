"""A real adapter store as a process, with its data in a folder of its own."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from adaptermesh.local.ports import free_ports
from adaptermesh.local.settings import child_environment
from adaptermesh.rpc.probe import probe

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


@contextlib.contextmanager
def run_store(home: Path) -> Iterator[str]:
    """Gives the host:port of a store that serves; stops it at the end."""
    (port,) = free_ports(1, random.Random())
    environment = child_environment(
        {"ADAPTERMESH_HOME": str(home), "ADAPTERMESH_STORE_PORT": str(port), "ADAPTERMESH_TRACES": ""}
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


def _wait_until_serving(target: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while wrong := probe(target):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the store does not serve: {wrong}\n{log.read_text(errors='replace')[-2000:]}"
            )
        time.sleep(0.1)
