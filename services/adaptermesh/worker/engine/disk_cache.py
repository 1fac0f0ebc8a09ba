"""Adapters on local disk: a folder for each digest with manifest.json and tensors.safetensors.

An entry is written to a temporary folder and renamed when it is whole. Nothing is trusted when it is read
back: the manifest must have the digest, each chunk must be what the manifest says. The byte budget is the
tier table's. All methods block; they run on the engine's input/output threads.
"""

import contextlib
import logging
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import digest_bytes, is_digest
from adaptermesh.worker.engine.host_arena import corrupt

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_TENSORS = "tensors.safetensors"
_TEMPORARY = "tmp-"


@dataclass(frozen=True, slots=True)
class DiskEntry:
    digest: str
    size_bytes: int


class DiskWriter:
    """An entry that is being written, by one thread.

    A full or broken disk ends it quietly: the cache is optional.
    """

    def __init__(self, digest: str, target: Path, manifest: bytes) -> None:
        self._digest = digest
        self._target = target
        self._folder = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        self._file: BinaryIO | None = None
        with self._guard():
            self._folder.mkdir(parents=True)
            (self._folder / _MANIFEST).write_bytes(manifest)
            self._file = (self._folder / _TENSORS).open("wb")

    def write(self, data: bytes | memoryview) -> None:
        if self._file is not None:
            with self._guard():
                self._file.write(data)

    def commit(self) -> bool:
        """Makes the entry visible; False if the disk did not take it."""
        if self._file is None:
            return False
        with self._guard():
            self._file.close()
            if self._target.exists():
                shutil.rmtree(self._target)
            self._folder.rename(self._target)
            self._file = None
            return True
        return False

    def abort(self) -> None:
        """Leaves nothing behind of an entry that was not committed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning(
                "disk cache can't take an adapter", extra={"digest": self._digest, "error": str(error)}
            )
            self.abort()


class DiskCache:
    """The entries under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def scan(self) -> list[DiskEntry]:
        """What an earlier process left, oldest first; half-written and broken entries are removed."""
        found: list[tuple[float, DiskEntry]] = []
        for path in self._folder.iterdir():
            digest = path.name.replace("-", ":", 1)
            manifest = None if not is_digest(digest) else _read_manifest(path, digest)
            tensors = path / _TENSORS
            if manifest is None or not tensors.is_file() or tensors.stat().st_size != manifest.size_bytes:
                shutil.rmtree(path, ignore_errors=True)
                continue
            found.append((path.stat().st_mtime, DiskEntry(digest, manifest.size_bytes)))
        return [entry for _, entry in sorted(found, key=lambda item: (item[0], item[1].digest))]

    def writer(self, digest: str, manifest: bytes) -> DiskWriter:
        return DiskWriter(digest, self._path(digest), manifest)

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an entry; raises MeshError DATA_LOSS (DATA_CORRUPT)."""
        manifest = _read_manifest(self._path(digest), digest)
        if manifest is None:
            raise corrupt(digest, "its manifest on disk is missing or damaged")
        return manifest

    def open(self, digest: str) -> BinaryIO:
        """The tensor file of an entry; raises MeshError DATA_LOSS (DATA_CORRUPT)."""
        try:
            return (self._path(digest) / _TENSORS).open("rb", buffering=0)
        except OSError as error:
            raise corrupt(digest, f"its tensors on disk can't be read: {error}") from None

    def delete(self, digest: str) -> None:
        shutil.rmtree(self._path(digest), ignore_errors=True)

    def _path(self, digest: str) -> Path:
        # A colon is no good in a file name everywhere.
        return self._folder / digest.replace(":", "-", 1)


def _read_manifest(folder: Path, digest: str) -> Manifest | None:
    try:
        data = (folder / _MANIFEST).read_bytes()
    except OSError:
        return None
    return Manifest.from_bytes(data) if digest_bytes(data) == digest else None
