"""One child process: started with a log file, stopped with a bound."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from adaptermesh.local import child
from adaptermesh.local.settings import child_environment

_TAIL_BYTES = 16 * 2**10


class ChildProcess:
    """A running child, in its own process group: a Ctrl-C in the terminal reaches the supervisor only."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, arguments: Sequence[str], environment: Mapping[str, str], log_file: Path
    ) -> "ChildProcess":
        """Starts `python <arguments>`; output is appended to the log file."""
        log: IO[bytes] = await asyncio.to_thread(log_file.open, "ab")
        try:
            process = await asyncio.create_subprocess_exec(
                # `child` needs nothing but the standard library.
                *(sys.executable, "-I", "-S", child.__file__, str(os.getpid())),
                *(sys.executable, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment(environment),
                start_new_session=True,
            )
        finally:
            log.close()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits until it has ended; returns the exit code."""
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens if the process has ended."""
        if self.exit_code is None:
            self._process.send_signal(number)

    async def stop(self, patience_seconds: float) -> bool:
        """SIGTERM, then SIGKILL when the patience is over; False if it took the latter."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(patience_seconds):
                await self.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.wait()
            return False
        return True


def log_tail(log_file: Path, lines: int = 12) -> str:
    """The last lines of a log. Blocks."""
    if not log_file.is_file():
        return ""
    with log_file.open("rb") as log:
        log.seek(max(0, log_file.stat().st_size - _TAIL_BYTES))
        text = log.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def exit_text(code: int) -> str:
    """An exit code for people."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
