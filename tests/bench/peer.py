"""The parent's side of a peer: a process that is told what to do, one thing at a time."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptermesh.local.settings import child_environment

ROOT = Path(__file__).parents[2]
_STOP_SECONDS = 30.0


class PeerError(Exception):
    """A peer failed; the message is its own."""


class Peer:
    """One process. `facts` is what it said of itself when it was loaded."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=child_environment(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a command and waits for its answer, however long it takes.

        Raises:
            PeerError: the peer answered with an error, or is gone.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise PeerError(f"{self.name} has no pipes")
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._obituary()) from None
        line = stdout.readline()
        if not line:
            raise PeerError(self._obituary())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """Ends the process: it stops when it has nothing more to read."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _obituary(self) -> str:
        code = self._process.wait()
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return f"{self.name} ended with exit code {code}:\n{tail}"
