"""Tells every router what this worker holds and how busy it is, for as long as it lives."""

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import grpc.aio

from adaptermesh.api.router.v1 import router_pb2, router_pb2_grpc
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.rpc.channel import open_channel
from adaptermesh.worker.residency import ReportCursor, StatusBoard
from adaptermesh.worker.wire import report_message

log = logging.getLogger(__name__)

_ReportCall: TypeAlias = (
    "grpc.aio.StreamStreamCall[router_pb2.ReportWorkerRequest, router_pb2.ReportWorkerResponse]"
)
Resolve = Callable[[str], Awaitable[frozenset[str]]]


@dataclass(frozen=True, slots=True)
class ReporterConfig:
    """Where reports go and how often."""

    routers: tuple[str, ...]
    """`host:port`; every address that a name resolves to is one router."""
    interval_seconds: float = 0.02
    """Least time between two reports to one router."""
    heartbeat_seconds: float = 1.0
    """Longest time between two reports."""
    resolve_seconds: float = 3.0
    """Between two look-ups of the names."""
    timeout_seconds: float = 10.0
    """A router that acknowledges nothing for this long is taken to be gone."""
    backoff_seconds: float = 0.1
    """Before the second attempt to connect; doubles up to 2 s."""


async def resolve(target: str) -> frozenset[str]:
    """Every `ip:port` behind `host:port`; those of IPv4 alone if there are any, so that a host counts once.

    Raises:
        OSError: the name can't be resolved.
    """
    host, _, port = target.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    four = frozenset(f"{entry[4][0]}:{port}" for entry in found if entry[0] == socket.AF_INET)
    return four or frozenset(f"[{entry[4][0]}]:{port}" for entry in found)


class Reporter:
    """Keeps one stream of reports to each router; owner of their tasks."""

    def __init__(
        self,
        config: ReporterConfig,
        info: worker_pb2.WorkerInfo,
        board: StatusBoard,
        resolver: Resolve = resolve,
    ) -> None:
        self._config = config
        self._info = info
        self._board = board
        self._resolve = resolver
        self._links: dict[str, _RouterLink] = {}
        self._known: dict[str, frozenset[str]] = {}

    async def run(self) -> None:
        """Runs until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                wanted = await self._addresses()
                for address, link in self._links.items():
                    link.wanted = address in wanted
                for address in wanted - self._links.keys():
                    link = self._links[address] = _RouterLink(address, self._config, self._info, self._board)
                    group.create_task(self._keep(link), name=f"report to {address}")
                await asyncio.sleep(self._config.resolve_seconds)

    async def _keep(self, link: "_RouterLink") -> None:
        try:
            await link.run()
        finally:
            self._links.pop(link.address, None)

    async def _addresses(self) -> frozenset[str]:
        found: set[str] = set()
        for name in self._config.routers:
            try:
                async with asyncio.timeout(self._config.timeout_seconds):
                    self._known[name] = await self._resolve(name)
            except OSError as error:
                # What a name meant before is the best guess while name service is away.
                log.warning("router name not resolved", extra={"router": name, "reason": str(error)})
            found |= self._known.get(name, frozenset())
        return frozenset(found)


class _StreamEnded(Exception):
    """The router ended the stream."""


class _RouterLink:
    """The stream to one router, opened again whenever it breaks."""

    def __init__(
        self, address: str, config: ReporterConfig, info: worker_pb2.WorkerInfo, board: StatusBoard
    ) -> None:
        self.address = address
        self.wanted = True
        """False once the address is no longer behind any name: the link ends when it breaks."""
        self._config = config
        self._info = info
        self._board = board
        self._acknowledged = 0
        self._heard_at = 0.0

    async def run(self) -> None:
        failures = 0
        while self.wanted:
            self._acknowledged = 0
            reason = await self._connect()
            failures = 1 if self._acknowledged else failures + 1
            level = logging.INFO if failures == 1 else logging.DEBUG
            log.log(level, "router not connected", extra={"router": self.address, "reason": reason})
            delay = min(2.0, self._config.backoff_seconds * 2.0 ** min(failures - 1, 10))
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311  # spreads retries

    async def _connect(self) -> str:
        """Reports over one stream until it breaks; returns why."""
        reason = ""
        async with open_channel(self.address) as channel:
            # No deadline: it lives as long as both ends do. Silence is bounded by `timeout_seconds`.
            call = router_pb2_grpc.RouterServiceStub(channel).ReportWorker()
            try:
                with self._board.follow() as cursor:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._listen(call, cursor))
                        group.create_task(self._report(call, cursor))
            except* grpc.aio.AioRpcError as errors:
                reason = _reasons(errors.exceptions)
            except* (_StreamEnded, TimeoutError, asyncio.InvalidStateError) as errors:
                # InvalidStateError: written to a call that has ended in the meantime.
                reason = reason or _reasons(errors.exceptions)
            finally:
                call.cancel()
        return reason

    async def _listen(self, call: _ReportCall, cursor: ReportCursor) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        async for response in call:
            if self._acknowledged == 0:
                log.info("reporting to router", extra={"router": self.address})
            self._heard_at = loop.time()
            self._acknowledged = max(self._acknowledged, response.acknowledged_sequence, 1)
            if response.snapshot_wanted:
                cursor.want_snapshot()
        raise _StreamEnded("the router ended the stream")

    async def _report(self, call: _ReportCall, cursor: ReportCursor) -> None:
        loop = asyncio.get_running_loop()
        sequence = 0
        while True:
            sequence += 1
            message = report_message(self._info, sequence, cursor.next_report())
            async with asyncio.timeout(self._config.timeout_seconds):
                await call.write(message)
            sent_at = loop.time()
            if sent_at - self._heard_at > self._config.timeout_seconds:
                raise TimeoutError("the router acknowledges nothing")
            await _wait(cursor.changed, self._config.heartbeat_seconds)
            await asyncio.sleep(max(0.0, sent_at + self._config.interval_seconds - loop.time()))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, or after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _reasons(errors: Iterable[BaseException]) -> str:
    return "; ".join(
        (error.details() or error.code().name) if isinstance(error, grpc.aio.AioRpcError) else str(error)
        for error in errors
    )
