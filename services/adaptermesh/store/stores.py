"""The store's parts, put together over one database and one blob store."""

import asyncio
import fcntl
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import MeshError, Reason, unavailable
from adaptermesh.core.rates import Rates
from adaptermesh.store.access.api_keys import ApiKeys
from adaptermesh.store.access.audit import Audit
from adaptermesh.store.access.authentication import Authentication, AuthenticationConfig
from adaptermesh.store.access.authority import Authority
from adaptermesh.store.access.gatekeeper import Gatekeeper
from adaptermesh.store.access.grants import Grants
from adaptermesh.store.access.tenants import Tenants
from adaptermesh.store.aliases import Aliases
from adaptermesh.store.blobs import BlobStore, FolderBlobStore
from adaptermesh.store.catalogue import Catalogue
from adaptermesh.store.database import Database, DatabaseConfig
from adaptermesh.store.download_counts import DownloadCounts
from adaptermesh.store.feed import Feed, FeedConfig
from adaptermesh.store.garbage import GarbageCollector
from adaptermesh.store.listing import Listing
from adaptermesh.store.manifests import Manifests
from adaptermesh.store.part_blobs import PartBlobs
from adaptermesh.store.periodic import PeriodicWork
from adaptermesh.store.policies import Policies
from adaptermesh.store.reading import Downloads
from adaptermesh.store.retention import FeedTrimmer, RetentionConfig
from adaptermesh.store.routes import Routes
from adaptermesh.store.s3_blobs import S3BlobStore
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.store.scrubbing import Scrubber
from adaptermesh.store.search import Search
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.signatures import Signatures
from adaptermesh.store.snapshot import SnapshotConfig, Snapshots
from adaptermesh.store.staging import Staging
from adaptermesh.store.statuses import Statuses
from adaptermesh.store.upload_sessions import UploadSessions
from adaptermesh.store.uploads import UploadConfig, Uploads
from adaptermesh.store.version_removal import Removals

log = logging.getLogger(__name__)

_LOCK_POLL_SECONDS = 0.1
_TRIM_SECONDS = 60.0
_COUNT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Everything that can be set."""

    folder: Path
    """For bytes: `staging`, and `blobs` unless they are in a bucket."""
    database: DatabaseConfig
    s3: S3Config | None = None
    """Where blobs are. None: in the folder."""
    uploads: UploadConfig = field(default_factory=UploadConfig)
    sessions: SessionConfig = field(default_factory=SessionConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    authentication: AuthenticationConfig = field(default_factory=AuthenticationConfig)
    lock_seconds: float = 10.0
    """How long to wait for another process to let go of the folder."""


class Stores:
    """Owns the parts and their order of opening and closing."""

    def __init__(self, config: StoreConfig, clock: Clock) -> None:
        self._config = config
        self._open = False
        self._lock = FolderLock(config.folder / "lock")
        self.staging = Staging(config.folder / "staging")
        self.feed = Feed(config.feed)
        self.database = Database(config.database, self.feed.announce)
        self.trimmer = FeedTrimmer(config.retention, self.database, clock)
        self.blobs = _blob_store(config)
        self.manifests = Manifests(self.blobs)
        self.downloads = Downloads(self.blobs)
        self.catalogue = Catalogue(self.database, clock)
        self.aliases = Aliases(self.database, clock)
        self.routes = Routes(self.database, clock)
        self.statuses = Statuses(self.database, clock)
        self.policies = Policies(self.database, clock)
        self.signatures = Signatures(self.database, clock)
        self.removals = Removals(self.database, clock, self.blobs, self.manifests)
        self.download_counts = DownloadCounts(self.database)
        self.listing = Listing(self.database)
        self.search = Search(self.database)
        self.snapshots = Snapshots(self.database, config.snapshots)
        self.tenants = Tenants(self.database, clock)
        self.api_keys = ApiKeys(self.database, clock)
        self.grants = Grants(self.database, clock)
        self.audit = Audit(self.database)
        self.authority = Authority(self.database)
        self.authentication = Authentication(config.authentication, self.api_keys, clock)
        self.gatekeeper = Gatekeeper(
            self.check_open, self.authentication, self.authority, self.catalogue, Rates(clock)
        )
        self.uploads = Uploads(config.uploads, self.catalogue, self.blobs, self.staging, self.authority)
        self.parts = PartBlobs(self.database, _part_store(config), clock)
        self.sessions = UploadSessions(
            config.sessions, self.database, self.catalogue, self.uploads, self.parts, self.staging, clock
        )
        self.garbage = GarbageCollector(self.database, self.blobs, self.parts, clock)
        self.scrubber = Scrubber(self.database, self.catalogue, self.blobs)
        self._periodic = (
            PeriodicWork("trimming of the change feed", self.trimmer.trim, _TRIM_SECONDS),
            PeriodicWork("counting of downloads", self.download_counts.flush, _COUNT_SECONDS),
        )

    async def open(self) -> None:
        """Takes the folder, brings the database up to date, and removes what a crash has left.

        The folder is this store's alone; others may share its database and its bucket, and be at work.

        Raises:
            MeshError: UNAVAILABLE if another process has the folder, or if the bucket can't be used.
        """
        await self._lock.take(self._config.lock_seconds)
        await self.database.open(str(uuid.uuid4()))
        await self.blobs.recover()
        await self.parts.recover()
        if self._config.s3 is None:
            await self.garbage.forget_removals()
        removed = await self.garbage.remove_unneeded(await self.staging.left_blobs())
        if removed:
            log.warning("blobs of unfinished uploads removed", extra={"count": removed})
        await self.staging.recover()
        for work in self._periodic:
            work.start()
        self._open = True

    def check_open(self) -> None:
        """Raises MeshError UNAVAILABLE before `open` has returned."""
        if not self._open:
            raise unavailable(Reason.STORE_UNREACHABLE, "the store is starting", retry_after=0.5)

    def drain(self) -> None:
        """Ends the watches and refuses new uploads."""
        self.uploads.drain()
        self.feed.close()

    async def close(self) -> None:
        """Finishes what was received and closes everything."""
        self.drain()
        await self.sessions.close()
        await self.uploads.close()
        await self.authentication.close()
        for work in self._periodic:
            await work.stop()
        await self.garbage.close()
        with suppress(MeshError):
            # Counts are not worth waiting for a database that is away.
            await self.download_counts.flush()
        await self.database.close()
        await self.parts.close()
        await self.blobs.close()
        self._lock.release()


def _blob_store(config: StoreConfig) -> BlobStore:
    return FolderBlobStore(config.folder / "blobs") if config.s3 is None else S3BlobStore(config.s3)


def _part_store(config: StoreConfig) -> BlobStore:
    if config.s3 is None:
        return FolderBlobStore(config.folder / "parts")
    return S3BlobStore(replace(config.s3, prefix=f"{config.s3.prefix.strip('/')}/parts"))


class FolderLock:
    """One process for a folder. The kernel lets go of it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    async def take(self, seconds: float) -> None:
        """Waits up to `seconds` for the lock; raises MeshError UNAVAILABLE after that."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = asyncio.get_running_loop().time() + seconds
        while not _try_lock(self._file):
            if asyncio.get_running_loop().time() >= deadline:
                self.release()
                message = f"another store runs on the folder {self._path.parent}"
                raise unavailable(Reason.STORE_UNREACHABLE, message, retry_after=seconds)
            await asyncio.sleep(_LOCK_POLL_SECONDS)

    def release(self) -> None:
        """Lets go of the lock, if it was taken."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
