"""Uploads: received, checked, brought into the canonical form, kept, and only then published."""

import asyncio
import errno
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.source_files import CARD_FILE
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason, base_mismatch, unavailable
from adaptermesh.core.roles import Permission
from adaptermesh.store.access.authority import Authority
from adaptermesh.store.access.caller import current_caller
from adaptermesh.store.access.quotas import bytes_of
from adaptermesh.store.blobs import BlobStore, file_digest
from adaptermesh.store.catalogue import Catalogue
from adaptermesh.store.headers import UploadHeader, check_header
from adaptermesh.store.keeping import Keeper
from adaptermesh.store.ownership import OwnedWork
from adaptermesh.store.records import BaseModelRecord, VersionRecord
from adaptermesh.store.search_facts import SearchFacts, search_facts
from adaptermesh.store.staging import Place, Staging, next_message, receive_files
from adaptermesh.store.words import MAX_CARD_CHARACTERS

log = logging.getLogger(__name__)

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class UploadConfig:
    """What uploads may cost."""

    max_bytes: int = 512 * 2**20
    max_files: int = 64
    concurrent: int = 8
    idle_seconds: float = 60.0
    """A client that sends nothing for so long is given up."""
    total_seconds: float = 3600.0
    """So is one that has not sent everything after so long."""
    ingest_threads: int = 2
    removal_seconds: float = 10.0
    """How long an upload waits for the removal of a blob that it needs, which then is put again."""


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
    parents: tuple[str, ...]
    facts: SearchFacts


class Uploads:
    """Takes uploads, a bounded number at the same time."""

    def __init__(
        self,
        config: UploadConfig,
        catalogue: Catalogue,
        blobs: BlobStore,
        staging: Staging,
        authority: Authority,
    ) -> None:
        self._authority = authority
        self._config = config
        self._catalogue = catalogue
        self._blobs = blobs
        self._staging = staging
        self._keeper = Keeper(catalogue, blobs, config.removal_seconds)
        self._work = OwnedWork()
        self._ingesting = ThreadPoolExecutor(config.ingest_threads, thread_name_prefix="ingest")
        self._active = 0
        self._active_of: Counter[str] = Counter()
        """The same by tenant."""
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
            base = await self.check(header)
            sources = await self._receive_files(place, header, pieces)
        except BaseException as error:
            await self._work.finish(self._leave(place))
            raise_if_full(error)
            raise
        return await self._work.finish(self._complete(header, base, sources, place))

    async def _receive_files(
        self, place: Place, header: UploadHeader, pieces: AsyncIterator[bytes]
    ) -> Mapping[str, Path]:
        try:
            async with asyncio.timeout(self._config.total_seconds):
                return await receive_files(place, header.files, pieces, self._config.idle_seconds)
        except TimeoutError as error:
            message = f"the files were not received within {self._config.total_seconds:g} s"
            raise MeshError(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, message) from error

    async def check(self, header: UploadHeader) -> BaseModelRecord:
        """The base of an upload whose header is legal; raises MeshError for another one."""
        check_header(header, self._config.max_files, self._config.max_bytes)
        await self.check_publisher(header)
        base = await self._catalogue.find_base_model(header.base_model)
        await self._check_parents(header, base)
        return base

    async def check_publisher(self, header: UploadHeader) -> None:
        """Raises MeshError unless the caller may upload there."""
        await self._authority.require(Permission.PUBLISH, header.adapter)

    async def check_room(self, header: UploadHeader) -> None:
        """Raises MeshError QUOTA_EXCEEDED if the tenant can't have so much more.

        Not asked for an upload in one piece before its digest is known: the same again is nothing more.
        """
        await self._authority.check_quota(header.adapter.namespace, header.size_bytes)

    def check_accepting(self) -> None:
        """Raises MeshError UNAVAILABLE (DRAINING) when nothing new is taken."""
        if self._draining:
            raise unavailable(Reason.DRAINING, "the store is shutting down", retry_after=1.0)

    async def _check_parents(self, header: UploadHeader, base: BaseModelRecord) -> None:
        """What an adapter was made from must be here and of the same base; publishing looks again."""
        for digest in header.parents:
            parent = (await self._catalogue.get_digest(digest)).record
            await self._authority.require_version(Permission.READ, parent.adapter, digest)
            if parent.base_digest != base.digest:
                raise base_mismatch(parent.ref, parent.base_digest, base.digest)

    def _admit(self) -> None:
        self.check_accepting()
        caller = current_caller.get()
        # One tenant leaves half of the places to the others.
        mine = 0 if caller.is_operator else self._active_of[caller.tenant]
        if self._active >= self._config.concurrent or mine >= max(1, self._config.concurrent // 2):
            raise MeshError(
                Code.RESOURCE_EXHAUSTED,
                Reason.OVERLOADED,
                f"{mine or self._active} uploads are in progress, the limit",
                retry_after=1.0,
            )
        self._active += 1
        self._active_of[caller.tenant] += 1
        self._idle.clear()

    async def _leave(self, place: Place) -> None:
        try:
            await place.discard()
        finally:
            self._active -= 1
            self._active_of -= Counter((current_caller.get().tenant,))
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
            raise_if_full(error)
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
        _check_expected(header, made.version)
        known = await self._catalogue.find_digest(made.version.digest)
        if known is not None:
            return UploadOutcome(known.record, created=False, feed_position=known.feed_position)
        if header.validate_only:
            return UploadOutcome(made.version, created=False, feed_position=0)
        await self._authority.check_quota(header.adapter.namespace, bytes_of(made.version))
        # The bytes first: a version that is visible can be fetched.
        blobs = {file.digest: sources[file.path] for file in header.files}
        blobs |= {made.version.digest: made.manifest, made.tensor_digest: made.tensors}
        await place.intend(blobs)
        published = await self._keeper.publish(
            blobs, made.version, made.tensor_digest, made.card, made.parents, made.facts
        )
        place.settle()
        stored = published.version
        return UploadOutcome(stored.record, published.created, stored.feed_position)


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
    digest = file_digest(tensors)
    return _Ingested(version, manifest_path, tensors, digest, _card(sources), header.parents, searched)


def _check_expected(header: UploadHeader, version: VersionRecord) -> None:
    if header.expected_digest in ("", version.digest):
        return
    raise MeshError(
        Code.FAILED_PRECONDITION,
        Reason.DIGEST_MISMATCH,
        f"'{header.adapter}' has digest {version.digest} here, not {header.expected_digest}: its files, or "
        "what is said of it, are others, or this store makes another canonical form of them",
        metadata={
            "name": str(header.adapter),
            "digest": version.digest,
            "expected_digest": header.expected_digest,
        },
    )


def _card(sources: Mapping[str, Path]) -> str:
    """The beginning of the card, which is text whatever it holds."""
    path = sources.get(CARD_FILE)
    if path is None:
        return ""
    with path.open("rb") as file:
        return file.read(MAX_CARD_CHARACTERS).decode(errors="replace")


def raise_if_full(error: BaseException) -> None:
    """Turns the one fault of the disk that the caller can act on into an error that says so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        raise MeshError(
            Code.RESOURCE_EXHAUSTED, Reason.OVERLOADED, "the store's disk is full", retry_after=60.0
        ) from error
