"""How the SDK calls: every call has a deadline, every failure is a `MeshError`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.rpc.channel import open_channel
from adaptermesh.rpc.status import DETAILS_KEY, mesh_error_from

Response = TypeVar("Response")
Item = TypeVar("Item")

DEFAULT_GATEWAY = "127.0.0.1:7700"
DEFAULT_ROUTER = "127.0.0.1:7701"
DEFAULT_STORE = "127.0.0.1:7702"

PAGE_SIZE = 500

# How gRPC words a connection that never came about, in contrast to one that was lost.
_NEVER_CONNECTED = ("connections to all backends failing", "failed to connect", "dns resolution failed")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Upper bounds in seconds for each kind of call.

    `transfer_seconds` bounds one upload or the download of one file, `generate_seconds` one answer,
    `load_seconds` bringing an adapter to a worker.
    """

    call_seconds: float = 10.0
    transfer_seconds: float = 600.0
    generate_seconds: float = 300.0
    load_seconds: float = 60.0


class Connection:
    """One channel to `target` (host:port). Use it in `async with`, or close() it."""

    def __init__(self, target: str, deadlines: Deadlines, unreachable: Reason, api_key: str = "") -> None:
        self.target = target
        self.deadlines = deadlines
        self._unreachable = unreachable
        self._channel = open_channel(target, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        await self._channel.close()

    async def _call(
        self, method: Callable[..., Awaitable[Response]], request: Any, timeout: float | None = None
    ) -> Response:
        """One call with one answer; raises MeshError."""
        try:
            return await method(request, timeout=self.deadlines.call_seconds if timeout is None else timeout)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.aio.AioRpcError) -> MeshError:
        return call_error(error, self.target, self._unreachable)


def call_error(error: grpc.aio.AioRpcError, target: str, unreachable: Reason) -> MeshError:
    """What a failed call to `target` means.

    Args:
        error: what the call raised.
        target: the address that was called; it is in the error's metadata.
        unreachable: the reason if the transport, not the peer, reported UNAVAILABLE.
    """
    details = error.details() or ""
    answered = any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    if error.code() is grpc.StatusCode.UNAVAILABLE and not answered:
        if any(words in details.lower() for words in _NEVER_CONNECTED):
            message = f"nothing answers at {target}"
        else:
            message = f"the connection to {target} was lost: {details}"
        return unavailable(unreachable, message, 1.0, target=target, cause=details[:512])
    mesh_error = mesh_error_from(error, unreachable)
    if mesh_error.code is Code.DEADLINE_EXCEEDED and not answered:
        mesh_error = MeshError(
            Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, f"no answer from {target} in time"
        )
    mesh_error.metadata.setdefault("target", target)
    return mesh_error


async def all_pages(page: Callable[[str], Awaitable[tuple[Sequence[Item], str]]]) -> list[Item]:
    """Every item of a paginated list; `page` takes a page token and returns items and the next token."""
    found: list[Item] = []
    token = ""
    while True:
        items, token = await page(token)
        found.extend(items)
        if not token:
            return found
