"""Where the engine's thread leaves tokens and the event loop picks them up."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from adaptermesh.core.errors import MeshError
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.worker.engine.request import Outcome


@dataclass(frozen=True, slots=True)
class Mail:
    """All output since the last mail, and the end if it has come."""

    text: str
    token_ids: tuple[int, ...]
    end: Outcome | MeshError | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token if they were asked for."""
    index: int = 0
    """Which of the request's answers it belongs to."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's next tokens; they come before the output."""

    @property
    def empty(self) -> bool:
        return not self.has_output and self.end is None

    @property
    def has_output(self) -> bool:
        """Whether it is more than the end."""
        return bool(self.text or self.token_ids or self.prompt_logprobs)


class Mailbox:
    """The engine's `Listener` of one answer.

    The engine never waits: what a slow client has not taken yet grows together into one mail, whose size is
    bounded by the request's own prompt and output. The loop is woken once for each mail. `arrived` wakes the
    reader; the mailboxes of several answers share it.
    """

    def __init__(self, arrived: asyncio.Event, index: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._index = index
        self._arrived = arrived
        self._lock = threading.Lock()
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._end: Outcome | MeshError | None = None
        self._woken = False

    def on_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._prompt_logprobs.extend(logprobs)
            wake = self._wake_due()
        if wake:
            self._wake()

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._text.append(text)
            self._token_ids.extend(token_ids)
            self._logprobs.extend(logprobs)
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

    def take(self) -> Mail:
        """What has come since the last mail; an empty mail if nothing has."""
        with self._lock:
            self._woken = False
            mail = Mail(
                "".join(self._text),
                tuple(self._token_ids),
                self._end,
                tuple(self._logprobs),
                self._index,
                tuple(self._prompt_logprobs),
            )
            self._text, self._token_ids, self._logprobs, self._prompt_logprobs = [], [], [], []
        return mail

    def _wake_due(self) -> bool:
        due, self._woken = not self._woken, True
        return due

    def _wake(self) -> None:
        # A closed loop has no reader left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)
