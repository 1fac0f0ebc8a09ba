"""Where the engine's thread leaves tokens and the event loop picks them up."""

import asyncio
import contextlib
import threading
from dataclasses import dataclass

from adaptermesh.core.errors import MeshError
from adaptermesh.worker.engine.request import Outcome


@dataclass(frozen=True, slots=True)
class Mail:
    """All output since the last mail, and the end if it has come."""

    text: str
    token_ids: tuple[int, ...]
    end: Outcome | MeshError | None


class Mailbox:
    """The engine's `Listener` of one request.

    The engine never waits: what a slow client has not taken yet grows together into one mail, whose size is
    bounded by the request's own output. The loop is woken once for each mail.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._end: Outcome | MeshError | None = None
        self._woken = False

    def on_tokens(self, text: str, token_ids: list[int]) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._text.append(text)
            self._token_ids.extend(token_ids)
            wake = self._wake_due()
        if wake:
            self._wake()

    def on_finish(self, outcome: Outcome) -> None:
        self.close(outcome)

    def on_error(self, error: MeshError) -> None:
        self.close(error)

    def close(self, end: Outcome | MeshError) -> None:
        """Ends the output; the first end counts. Any thread."""
        with self._lock:
            if self._end is not None:
                return
            self._end = end
            wake = self._wake_due()
        if wake:
            self._wake()

    async def take(self) -> Mail:
        """The next mail; never an empty one."""
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            self._woken = False
            mail = Mail("".join(self._text), tuple(self._token_ids), self._end)
            self._text, self._token_ids = [], []
        return mail

    def _wake_due(self) -> bool:
        due, self._woken = not self._woken, True
        return due

    def _wake(self) -> None:
        # A closed loop has no reader left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)
