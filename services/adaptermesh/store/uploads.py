"""Uploads: received, checked, brought into the canonical form, kept, and only then published."""

import asyncio
import errno
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.source_files import CARD_FILE
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch, unavailable
from adaptermesh.store.blobs import BlobStore, file_digest
from adaptermesh.store.catalogue import Catalogue, Published
from adaptermesh.store.headers import UploadHeader, check_header
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.records import BaseModelRecord, VersionRecord
from adaptermesh.store.search_facts import SearchFacts, search_facts
from adaptermesh.store.staging import Place, Staging, next_message, receive_files
from adaptermesh.store.words import MAX_CARD_CHARACTERS

log = logging.getLogger(__name__)

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT)
_KEEP_ATTEMPTS = 3
_CONFIRM_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class UploadConfig:
    """What uploads may cost."""

    max_bytes: int = 512 * 2**20
    max_files: int = 64
    concurrent: int = 8
    idle_seconds: float = 60.0
    """A client that sends nothing for so long is given up."""
    ingest_threads: int = 2


@dataclass(frozen=True, slots=True)
class UploadOutcome:
    """What became of an upload."""

    version: VersionRecord
    created: bool
    feed_position: int


@dataclass(frozen=True, slots=True)
class _Ingested:
    """The canonical form of an upload, still in its staging folder."""

    version: VersionRecord
    manifest: Path
    tensors: Path
    tensor_digest: str
    card: str
    facts: SearchFacts


class Uploads:
    """Takes uploads, a bounded number at the same time."""

    def __init__(
        self, config: UploadConfig, catalogue: Catalogue, blobs: BlobStore, staging: Staging
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._blobs = blobs
        self._staging = staging
        self._work = OwnedWork()
        self._ingesting = ThreadPoolExecutor(config.ingest_threads, thread_name_prefix="ingest")
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def drain(self) -> None:
        """Refuses new uploads; those that have begun go on."""
        self._draining = True

    @property
    def active(self) -> int:
        """How many uploads are in progress."""
        return self._active

    @property
    def finishing(self) -> int:
        """How many uploads have been received completely and are being checked or published."""
        return self._work.running

    async def drained(self) -> None:
        """Returns when no upload is in progress."""
        await self._idle.wait()

    async def close(self) -> None:
        """Waits for what was received completely."""
        self._draining = True
        await self._work.wait()
        self._ingesting.shutdown(wait=False)

    async def first(self, messages: AsyncIterator[T]) -> T | None:
        """The first message of an upload, None if there is none; waits as long as for any other."""
        return await next_message(messages, self._config.idle_seconds)

    async def receive(self, header: UploadHeader, pieces: AsyncIterator[bytes]) -> UploadOutcome:
        """Takes one upload and publishes it, unless it is there already or is only to be checked.

        A caller that goes away before the last byte leaves nothing behind; after it, the upload is finished.

        Raises:
            MeshError: why it was refused; nothing of it is kept then.
        """
        try:
            return await self._receive(header, pieces)
        except MeshError as error:
            fields = {"adapter": str(header.adapter)[:200], "reason": error.reason.value}
            log.info("upload refused", extra={**fields, "detail": error.message})
            raise

    async def _receive(self, header: UploadHeader, pieces: AsyncIterator[bytes]) -> UploadOutcome:
        self._admit()
        place = self._staging.place()
        try:
            check_header(header, self._config.max_files, self._config.max_bytes)
            base = await self._catalogue.find_base_model(header.base_model)
            await self._check_parents(header, base)
            sources = await receive_files(place, header.files, pieces, self._config.idle_seconds)
        except BaseException as error:
            await self._work.finish(self._leave(place))
            _raise_if_full(error)
            raise
        return await self._work.finish(self._complete(header, base, sources, place))

    async def _check_parents(self, header: UploadHeader, base: BaseModelRecord) -> None:
        """What an adapter was made from must be here and of the same base; versions never go away."""
        for digest in header.parents:
            parent = (await self._catalogue.get_digest(digest)).record
            if parent.base_digest != base.digest:
                raise base_mismatch(parent.ref, parent.base_digest, base.digest)

    def _admit(self) -> None:
        if self._draining:
            raise unavailable(Reason.DRAINING, "the store is shutting down", retry_after=1.0)
        if self._active >= self._config.concurrent:
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.OVERLOADED,
                f"{self._active} uploads are in progress, the limit",
                retry_after=1.0,
            )
        self._active += 1
        self._idle.clear()

    async def _leave(self, place: Place) -> None:
        try:
            await place.discard()
        finally:
            self._active -= 1
            if self._active == 0:
                self._idle.set()

    async def _complete(
        self, header: UploadHeader, base: BaseModelRecord, sources: Mapping[str, Path], place: Place
    ) -> UploadOutcome:
        try:
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._ingesting, _ingest, header, base, sources, place.folder)
            outcome = await self._publish(header, sources, made, place)
        except OSError as error:
            _raise_if_full(error)
            raise
        finally:
            await self._leave(place)
        version = outcome.version
        log.info(
            "upload finished",
            extra={
                "version": version.ref,
                "digest": version.digest,
                "size_bytes": header.size_bytes,
                "new": outcome.created,
                "validate_only": header.validate_only,
                "feed_position": outcome.feed_position,
            },
        )
        return outcome

    async def _publish(
        self, header: UploadHeader, sources: Mapping[str, Path], made: _Ingested, place: Place
    ) -> UploadOutcome:
        known = await self._catalogue.find_digest(made.version.digest)
        if known is not None:
            return UploadOutcome(known.record, created=False, feed_position=known.feed_position)
        if header.validate_only:
            return UploadOutcome(made.version, created=False, feed_position=0)
        # The bytes first: a version that is visible can be fetched.
        blobs = {file.digest: sources[file.path] for file in header.files}
        blobs |= {made.version.digest: made.manifest, made.tensor_digest: made.tensors}
        await place.intend(blobs)
        published = await self._keep_and_publish(blobs, made)
        place.settle()
        stored = published.version
        return UploadOutcome(stored.record, published.created, stored.feed_position)

    async def _keep_and_publish(self, blobs: Mapping[str, Path], made: _Ingested) -> Published:
        """Again if a blob was collected as garbage before its version could be seen to need it."""
        for _ in range(_KEEP_ATTEMPTS):
            for digest, path in blobs.items():
                await self._blobs.put(digest, path)
            try:
                return await self._catalogue.publish(
                    made.version, made.tensor_digest, made.card, partial(self._confirm, blobs), made.facts
                )
            except _Collected:
                log.info("blobs are put again", extra={"digest": made.version.digest})
        message = "garbage collection removed the upload's blobs again and again"
        raise unavailable(Reason.OVERLOADED, message, retry_after=1.0)

    async def _confirm(self, digests: Iterable[str]) -> None:
        """Raises unless all blobs are there. Writers wait meanwhile, so not for long."""
        try:
            async with asyncio.timeout(_CONFIRM_SECONDS):
                found = await asyncio.gather(*(self._blobs.stat(digest) for digest in digests))
        except TimeoutError as error:
            message = "the blobs could not be seen in time"
            raise unavailable(Reason.STORE_UNREACHABLE, message, retry_after=1.0) from error
        if None in found:
            raise _Collected


class _Collected(Exception):
    """A blob that was put is gone."""


def _ingest(
    header: UploadHeader, base: BaseModelRecord, sources: Mapping[str, Path], folder: Path
) -> _Ingested:
    """Checks an upload and writes its canonical form; blocks."""
    facts = BaseFacts.from_config(base.model_id, json.loads(base.config_json), base.weights_digest)
    bundle = SourceBundle(
        files=sources,
        namespace=header.adapter.namespace,
        name=header.adapter.name,
        task=header.task,
        description=header.description,
        tags=header.tags,
        license=header.license,
        author=header.author,
        parents=header.parents,
        merge_recipe=header.merge_recipe,
    )
    tensors = folder / "canonical.safetensors"
    result = ingest(bundle, facts, tensors)
    manifest = result.manifest.to_bytes()
    manifest_path = folder / "manifest.json"
    manifest_path.write_bytes(manifest)
    version = VersionRecord(
        namespace=header.adapter.namespace,
        name=header.adapter.name,
        number=0,
        digest=digest_bytes(manifest),
        base_digest=base.digest,
        base_model_id=base.model_id,
        task=header.task,
        description=header.description,
        tags=(*header.tags, *(tag for tag in result.manifest.tags if tag not in header.tags)),
        license=result.manifest.license,
        kind=result.manifest.kind,
        op_kinds=tuple(result.manifest.op_kinds),
        max_rank=result.manifest.max_rank,
        size_bytes=result.manifest.size_bytes,
        servable=result.manifest.servable,
        unservable_reason=result.manifest.unservable_reason,
        warnings=tuple(result.warnings),
        create_time_us=0,
        source_files=header.files,
    )
    searched = search_facts(result.manifest.languages, result.manifest.metrics)
    return _Ingested(version, manifest_path, tensors, file_digest(tensors), _card(sources), searched)


def _card(sources: Mapping[str, Path]) -> str:
    """The beginning of the card, which is text whatever it holds."""
    path = sources.get(CARD_FILE)
    if path is None:
        return ""
    with path.open("rb") as file:
        return file.read(MAX_CARD_CHARACTERS).decode(errors="replace")


def _raise_if_full(error: BaseException) -> None:
    """Turns the one fault of the disk that the caller can act on into an error that says so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        raise MeshError(
            Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "the store's disk is full", retry_after=60.0
        ) from error
