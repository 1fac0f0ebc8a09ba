"""One mesh on one home: a lock that the kernel drops when its holder ends, however it ends."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from adaptermesh.local.errors import LocalMeshError


class HomeLock:
    """Held while a mesh runs. The file says who holds it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            LocalMeshError: another mesh runs on this home.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        file = (self._home / "up.lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = _pid(file.read())
            file.close()
            raise LocalMeshError(
                f"a mesh already runs on {self._home}{f' (process {holder})' if holder else ''}",
                "stop it first, or choose another home with --home",
            ) from None
        self._file = file
        file.truncate(0)
        json.dump({"pid": os.getpid()}, file)
        file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _pid(text: str) -> int | None:
    try:
        return int(json.loads(text)["pid"])
    except (ValueError, KeyError, TypeError):
        return None
