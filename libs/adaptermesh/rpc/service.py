"""A service as a process: settings, logs, traces, server, signals, drain, exit."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from adaptermesh.core.clock import Clock, SystemClock
from adaptermesh.core.errors import MeshError
from adaptermesh.rpc.server import MeshServer, ServerConfig
from adaptermesh.rpc.settings import ServiceSettings
from adaptermesh.telemetry.logging import configure_logging
from adaptermesh.telemetry.tracing import Tracing, start_tracing

log = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)


@dataclass(slots=True)
class ServiceContext(Generic[SettingsT]):
    """What a service gets from its process."""

    settings: SettingsT
    tracing: Tracing
    clock: Clock
    server: MeshServer
    port: int = 0
    """The bound port; valid from `Service.start` on."""


class Service(Protocol):
    """What a process runs."""

    def register(self, server: MeshServer) -> None:
        """Adds the servicers, before the port is bound."""
        ...

    async def start(self) -> None:
        """Runs after the port is bound; the health check says SERVING when it returns."""
        ...

    async def drain(self) -> None:
        """After SIGTERM: takes nothing new and finishes what runs, within `settings.drain_seconds`."""
        ...

    async def stop(self) -> None:
        """Closes everything."""
        ...


def run(
    name: str,
    grpc_name: str,
    settings: SettingsT,
    factory: Callable[[ServiceContext[SettingsT]], Service],
) -> int:
    """Runs a service until SIGTERM or SIGINT; returns the exit code: 0 after a clean stop, 2 without a start.

    Args:
        name: the short name, e.g. "router".
        grpc_name: the fully qualified gRPC service, for health and reflection.
        settings: the service's settings.
        factory: makes the service.
    """
    configure_logging(name, settings.log_level, json_lines=settings.log_json)
    # In containers every replica has the same process id; the host name tells them apart.
    instance = f"{socket.gethostname()}-{os.getpid()}"
    tracing = start_tracing(name, instance, settings.trace_dir, settings.otlp_endpoint)
    try:
        return asyncio.run(_run(grpc_name, settings, tracing, factory))
    except (MeshError, OSError) as error:
        log.error("can't start", extra={"reason": str(error)})
        print(f"adaptermesh {name}: {error}", file=sys.stderr)  # noqa: T201  # for whoever started it by hand
        return 2
    finally:
        tracing.shutdown()


async def _run(
    grpc_name: str,
    settings: SettingsT,
    tracing: Tracing,
    factory: Callable[[ServiceContext[SettingsT]], Service],
) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = MeshServer(grpc_name, ServerConfig(settings.host, settings.port), tracing)
    context = ServiceContext(settings, tracing, SystemClock(), server)
    service = factory(context)
    service.register(server)
    context.port = await server.start()
    log.info("listening", extra={"host": settings.host, "port": context.port, "pid": os.getpid()})
    try:
        starting = asyncio.create_task(service.start())
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await server.set_serving(True)
            log.info("serving", extra={"port": context.port})
            await stopped
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        log.info("draining", extra={"drain_seconds": settings.drain_seconds})
        await server.set_serving(False)
        await service.drain()
    finally:
        stopped.cancel()
        await server.stop()
        await service.stop()
    log.info("stopped")
    return 0
