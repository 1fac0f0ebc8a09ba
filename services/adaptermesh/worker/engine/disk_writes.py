"""Writes adapters that have landed into the disk cache, behind the requests that waited for them."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from typing_extensions import Buffer

from adaptermesh.worker.engine.disk_cache import DiskCache, DiskWriter
from adaptermesh.worker.engine.host_arena import HostCopy

log = logging.getLogger(__name__)

_PIECE_BYTES = 2**20
_MOST_WAITING = 4
"""Adapters that may wait for the disk; each is held in memory, whatever the host tier evicts meanwhile."""
_NICENESS = 10


@dataclass(frozen=True, slots=True, eq=False)
class _Writing:
    digest: str
    manifest: bytes
    copy: HostCopy


class DiskWrites:
    """At most one writing for each adapter."""

    def __init__(
        self, disk: DiskCache, lock: threading.Condition, on_written: Callable[[str, int], None]
    ) -> None:
        """`on_written` gets digest and bytes of what is on disk now, under the lock."""
        self._disk = disk
        self._lock = lock
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(1, "adapter-disk-write", initializer=_yield_to_others)
        self._writings: dict[str, _Writing] = {}

    def start(self, digest: str, manifest: bytes, copy: HostCopy) -> Callable[[], None] | None:
        """Begins to write an adapter. Under the lock.

        If too many wait already, the caller has to run what he gets, without the lock: who brings more than
        the disk takes has to wait for it.
        """
        writing = self._writings[digest] = _Writing(digest, manifest, copy)
        if len(self._writings) > _MOST_WAITING:
            return lambda: self._run(writing)
        self._thread.submit(self._run, writing)
        return None

    def call_off(self, digest: str) -> None:
        """Nothing of this adapter shall be on disk. Under the lock."""
        self._writings.pop(digest, None)

    def close(self) -> None:
        """Waits until all that has begun is written. Without the lock."""
        self._thread.shutdown(wait=True)

    def _run(self, writing: _Writing) -> None:
        try:
            self._write(writing)
        except Exception:
            # The top of the thread's task. The cache is optional: what isn't in it is fetched again.
            log.exception("writing to the disk cache failed", extra={"digest": writing.digest})
        finally:
            with self._lock:
                if self._is_current(writing):
                    del self._writings[writing.digest]

    def _write(self, writing: _Writing) -> None:
        with self._lock:
            if not self._is_current(writing):
                return
        writer = self._disk.writer(writing.digest, writing.manifest)
        try:
            self._fill(writing, writer)
            with self._lock:
                if self._is_current(writing) and writer.commit():
                    self._on_written(writing.digest, writing.copy.manifest.size_bytes)
        finally:
            writer.abort()

    def _fill(self, writing: _Writing, writer: DiskWriter) -> None:
        data = memoryview(cast("Buffer", writing.copy.data.numpy()))
        for start in range(0, len(data), _PIECE_BYTES):
            with self._lock:
                if not self._is_current(writing):
                    return
            writer.write(data[start : start + _PIECE_BYTES])

    def _is_current(self, writing: _Writing) -> bool:
        return self._writings.get(writing.digest) is writing


def _yield_to_others() -> None:
    """The thread's work can wait; that of the requests can't."""
    if sys.platform == "linux":
        # There a thread is nice by itself.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
