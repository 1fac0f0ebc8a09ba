"""The store as a process: its parts, opened once the port is bound."""

import asyncio
from contextlib import suppress
from pathlib import Path

from adaptermesh.api.access.v1 import access_pb2_grpc
from adaptermesh.api.store.v1 import store_pb2_grpc
from adaptermesh.rpc.credentials import Credentials
from adaptermesh.rpc.server import MeshServer
from adaptermesh.rpc.service import ServiceContext
from adaptermesh.store.access.authentication import AuthenticationConfig
from adaptermesh.store.access.servicer import GRPC_NAME as ACCESS_GRPC_NAME
from adaptermesh.store.access.servicer import AccessServicer
from adaptermesh.store.database import DatabaseConfig
from adaptermesh.store.feed import FeedConfig
from adaptermesh.store.retention import RetentionConfig
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.store.servicer import StoreServicer
from adaptermesh.store.session_config import SessionConfig
from adaptermesh.store.settings import StoreSettings
from adaptermesh.store.snapshot import SnapshotConfig
from adaptermesh.store.stores import StoreConfig, Stores
from adaptermesh.store.uploads import UploadConfig

GRPC_NAME = "adaptermesh.api.store.v1.StoreService"


class StoreService:
    """What `python -m adaptermesh.store` runs."""

    def __init__(self, context: ServiceContext[StoreSettings]) -> None:
        self._drain_seconds = context.settings.drain_seconds
        self._stores = Stores(store_config(context.settings), context.clock)

    def register(self, server: MeshServer) -> None:
        """Adds the servicers, and who may call them."""
        store_pb2_grpc.add_StoreServiceServicer_to_server(StoreServicer(self._stores), server.grpc)
        access_pb2_grpc.add_AccessServiceServicer_to_server(AccessServicer(self._stores), server.grpc)
        server.show(ACCESS_GRPC_NAME)
        server.guard(self._stores.gatekeeper)
        if self._stores.authentication.required:
            server.hide_connections()

    async def start(self) -> None:
        """Opens the catalogue and the blobs."""
        await self._stores.open()

    async def drain(self) -> None:
        """Ends the watches and waits for the uploads; what else runs has the server's grace."""
        self._stores.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await self._stores.uploads.drained()

    async def stop(self) -> None:
        """Closes everything."""
        await self._stores.close()


def store_config(settings: StoreSettings) -> StoreConfig:
    """The parts' configuration from the settings."""
    folder = Path(settings.blobs) if settings.blobs else settings.home / "store"
    catalogue = settings.home.absolute() / "store" / "catalogue.db"
    return StoreConfig(
        folder=folder.absolute(),
        database=DatabaseConfig(
            url=settings.database_url.get_secret_value() or f"sqlite+aiosqlite:///{catalogue}",
            connections=settings.database_connections,
            busy_seconds=settings.database_busy_seconds,
        ),
        s3=_s3_config(settings) if settings.s3_endpoint else None,
        uploads=UploadConfig(
            max_bytes=settings.max_upload_bytes,
            max_files=settings.max_upload_files,
            concurrent=settings.concurrent_uploads,
            idle_seconds=settings.upload_idle_seconds,
            total_seconds=settings.upload_total_seconds,
            ingest_threads=settings.ingest_threads,
        ),
        sessions=SessionConfig(
            seconds=settings.upload_session_seconds,
            most=settings.max_upload_sessions,
            most_bytes=settings.max_upload_session_bytes,
            parts_at_once=settings.concurrent_parts,
            idle_seconds=settings.upload_idle_seconds,
        ),
        feed=FeedConfig(heartbeat_seconds=settings.heartbeat_seconds),
        retention=RetentionConfig(
            max_age_seconds=settings.feed_max_age_seconds,
            max_changes=settings.feed_max_changes,
            min_changes=settings.feed_min_changes,
        ),
        authentication=AuthenticationConfig(
            required=settings.authentication is Credentials.KEYS,
            root_key=settings.root_key.get_secret_value(),
        ),
        snapshots=SnapshotConfig(concurrent=settings.concurrent_snapshots, seconds=settings.snapshot_seconds),
    )


def _s3_config(settings: StoreSettings) -> S3Config:
    return S3Config(
        endpoint=settings.s3_endpoint,
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        region=settings.s3_region,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        ca_file=settings.s3_ca_file,
    )
