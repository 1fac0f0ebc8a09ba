"""A version verified end to end: the bytes that arrive here, and those that the store reads again."""

import hashlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptermesh.client.integrity_records import BlobCheck, Verification
from adaptermesh.client.records import SourceFile, Version
from adaptermesh.client.transfer import FileStream, Progress, ProgressCallback
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.core.refs import parse_ref

if TYPE_CHECKING:
    from adaptermesh.client.store import StoreClient

CANONICAL = "canonical form"
_MANIFEST = "manifest"
_TENSORS = "tensors"
FileOpener = Callable[[str, str], FileStream]
"""The stored bytes of a version's digest and a path."""


class Verifier:
    """Downloads everything of a version and keeps nothing of it."""

    def __init__(self, store: "StoreClient", files: FileOpener, progress: ProgressCallback | None) -> None:
        self._store = store
        self._files = files
        self._progress = progress
        self._done = 0

    async def verify(self, ref: str) -> Verification:
        """See `StoreClient.verify`."""
        version = await self._find(ref)
        total = version.size_bytes + sum(file.size_bytes for file in version.source_files)
        checks = [await self._check_canonical(version, total)]
        checks += [await self._check_file(version, file, total) for file in version.source_files]
        stored = await self._store.verify_stored(version.digest)
        return Verification(version, tuple(checks), tuple(_named(check, version) for check in stored))

    async def _find(self, ref: str) -> Version:
        """The version, even if its manifest is what is damaged: resolving brings that along."""
        try:
            return (await self._store.resolve(ref, include_unusable=True)).version
        except MeshError as error:
            if error.reason is not Reason.DATA_CORRUPT:
                raise
            for version in await self._store.list_versions(str(parse_ref(ref).adapter)):
                if version.digest == error.metadata.get("digest"):
                    return version
            raise

    async def _check_canonical(self, version: Version, total: int) -> BlobCheck:
        def on_progress(progress: Progress) -> None:
            self._report(CANONICAL, progress.done_bytes, total)

        problem = ""
        try:
            await self._store.fetch(version.digest, os.devnull, include_unusable=True, progress=on_progress)
        except MeshError as error:
            problem = _problem(error)
        self._done += version.size_bytes
        return BlobCheck(version.digest, version.size_bytes, problem, CANONICAL)

    async def _check_file(self, version: Version, file: SourceFile, total: int) -> BlobCheck:
        digest, size, problem = hashlib.sha256(), 0, ""
        try:
            async for data in self._files(version.digest, file.path)(0):
                digest.update(data)
                size += len(data)
                self._report(file.path, size, total)
        except MeshError as error:
            problem = _problem(error)
        found = f"sha256:{digest.hexdigest()}"
        if not problem and found != file.digest:
            problem = f"it arrived as {found}"
        self._done += file.size_bytes
        return BlobCheck(file.digest, file.size_bytes, problem, file.path)

    def _report(self, path: str, count: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(path, self._done + count, total))


def _problem(error: MeshError) -> str:
    """What is wrong with the bytes; any other error is raised on."""
    if error.reason is not Reason.DATA_CORRUPT:
        raise error
    return error.message


def _named(check: BlobCheck, version: Version) -> BlobCheck:
    """What a blob is to a version: the store knows digests only."""
    names = {file.digest: file.path for file in version.source_files} | {version.digest: _MANIFEST}
    return BlobCheck(check.digest, check.size_bytes, check.problem, names.get(check.digest, _TENSORS))
