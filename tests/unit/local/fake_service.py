"""A service of the mesh that does nothing but be there. Run as a process: `fake_service ROLE BEHAVIOUR`."""

import asyncio
import os
import signal
import sys
import time
from typing import Any

from tests.unit.client.fake_services import FakeGateway, fake_router, fake_store, fake_worker, serve


def servicer_of(role: str) -> Any:
    if role == "router":
        return fake_router([address for address in os.environ["FAKE_WORKERS"].split(",") if address])
    return {"store": fake_store, "worker": fake_worker, "gateway": FakeGateway}[role]()


async def run(role: str, behaviour: str) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    port = int(os.environ[f"ADAPTERMESH_{role.upper()}_PORT"])
    async with serve(servicer_of(role), serving=behaviour != "mute", port=port):
        print(f"fake {role} at {port}", flush=True)
        await stopping.wait()


if __name__ == "__main__":
    if sys.argv[2] == "broken":
        print("can't start: the disk is full", flush=True)
        sys.exit(3)
    asyncio.run(run(*sys.argv[1:]))
    if sys.argv[2] == "stubborn":
        # It has taken the signal, but stays for longer than any patience in the tests.
        time.sleep(600)
