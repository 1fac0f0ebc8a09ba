"""The store's settings: `ADAPTERMESH_STORE_*`."""

import ssl
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from adaptermesh.rpc.credentials import Credentials
from adaptermesh.rpc.settings import ServiceSettings
from adaptermesh.store.access.authentication import MIN_ROOT_KEY


class StoreSettings(ServiceSettings):
    """Read from the environment."""

    # A value that is refused is not shown: it may hold a password or the secret key.
    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_STORE_", hide_input_in_errors=True)

    port: int = Field(default=7702, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    database_url: SecretStr = Field(
        default=SecretStr(""),
        description="SQLAlchemy URL of the catalogue: sqlite+aiosqlite:///<path>, or "
        "postgresql+asyncpg://<user>:<password>@<host>:<port>/<name>. Empty: <home>/store/catalogue.db.",
    )
    blobs: str = Field(
        default="",
        description="Folder for uploads in progress, and for the bytes unless S3 has them. One store each. "
        "Empty: <home>/store.",
    )
    s3_endpoint: str = Field(
        default="",
        description="S3 server that keeps the bytes, host:port; several stores may share its bucket. "
        "Empty: the folder keeps them.",
    )
    s3_bucket: str = Field(default="adaptermesh", description="The bucket. It must be there.")
    s3_prefix: str = Field(default="", description="What keys begin with. Empty: the bucket is this mesh's.")
    s3_region: str = Field(default="us-east-1", description="The bucket's region.")
    s3_access_key: str = Field(default="", description="Access key. Empty: calls are not signed.")
    s3_secret_key: SecretStr = Field(default=SecretStr(""), description="Secret key.")
    s3_secure: bool = Field(default=True, description="Calls the S3 server over TLS.")
    authentication: Credentials = Field(
        default=Credentials.NONE,
        description="What callers must show. none: nothing, everybody may do everything. keys: an API key.",
    )
    root_key: SecretStr = Field(
        default=SecretStr(""),
        description="A key of the operator's, at least 32 characters, for the first API keys. Empty: none.",
    )
    s3_ca_file: str = Field(
        default="",
        description="PEM file with the certificates of the authorities that the S3 server's own is checked "
        "against. Empty: those that the system trusts.",
    )
    max_upload_bytes: int = Field(
        default=512 * 2**20, gt=0, description="Largest upload, all its files together, in bytes."
    )
    max_upload_files: int = Field(default=64, gt=0, description="Most files of one upload.")
    concurrent_uploads: int = Field(
        default=8, gt=0, description="Uploads at the same time; one more is refused and told when to retry."
    )
    upload_idle_seconds: float = Field(
        default=60.0, gt=0, description="An upload that sends nothing for so long is given up, in seconds."
    )
    upload_session_seconds: float = Field(
        default=24 * 3600.0,
        gt=0,
        description="An upload in parts to which nothing comes for so long is given up, in seconds; one that "
        "is completed is remembered for so long.",
    )
    max_upload_sessions: int = Field(
        default=256,
        gt=0,
        description="Uploads in parts that have begun and not ended, in all stores together.",
    )
    max_upload_session_bytes: int = Field(
        default=64 * 2**30, gt=0, description="Most bytes of those uploads together."
    )
    concurrent_parts: int = Field(
        default=16, gt=0, description="Parts of uploads that are received at the same time; more wait."
    )
    upload_total_seconds: float = Field(
        default=3600.0, gt=0, description="So is one that has not sent everything after so long, in seconds."
    )
    ingest_threads: int = Field(default=2, gt=0, description="Uploads that are checked at the same time.")
    database_connections: int = Field(
        default=16,
        ge=4,
        description="Database transactions at the same time; more wait. On PostgreSQL each is a connection "
        "of each store, which has one more to listen.",
    )
    database_busy_seconds: float = Field(
        default=10.0, gt=0, description="How long a transaction waits for its turn, in seconds."
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="A watcher of the change feed hears at least this often, in seconds."
    )
    feed_max_age_seconds: float = Field(
        default=30 * 24 * 3600.0,
        gt=0,
        description="Changes older than so many seconds leave the change feed. Who has not read them yet "
        "takes a snapshot.",
    )
    feed_max_changes: int = Field(
        default=1_000_000, gt=0, description="Most changes in the change feed; older ones leave it."
    )
    feed_min_changes: int = Field(
        default=10_000,
        ge=0,
        description="So many of the last changes stay in the change feed however old they are.",
    )
    concurrent_snapshots: int = Field(default=4, gt=0, description="Snapshots at the same time; more wait.")
    snapshot_seconds: float = Field(
        default=60.0, gt=0, description="How long one snapshot may take, the wait included, in seconds."
    )

    @field_validator("root_key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if 0 < len(key.get_secret_value()) < MIN_ROOT_KEY:
            raise ValueError(f"must have at least {MIN_ROOT_KEY} characters")
        return key

    @field_validator("s3_endpoint")
    @classmethod
    def _host_and_port(cls, endpoint: str) -> str:
        if "/" in endpoint:
            raise ValueError("must be host:port, without a scheme")
        return endpoint

    @field_validator("s3_ca_file")
    @classmethod
    def _readable_certificates(cls, path: str) -> str:
        if path:
            try:
                ssl.create_default_context(cafile=path)
            except OSError as error:
                # Also an ssl.SSLError.
                raise ValueError(f"no PEM file of certificates: {error.strerror or error}") from error
        return path

    @model_validator(mode="after")
    def _both_keys_or_none(self) -> Self:
        if bool(self.s3_access_key) != bool(self.s3_secret_key.get_secret_value()):
            raise ValueError("an S3 access key needs its secret key, and the other way round")
        return self

    @model_validator(mode="after")
    def _fewest_and_most_changes(self) -> Self:
        if self.feed_min_changes > self.feed_max_changes:
            raise ValueError("feed_min_changes must not be more than feed_max_changes")
        return self

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: SecretStr) -> SecretStr:
        if not _is_known(url.get_secret_value()):
            raise ValueError(
                "must be sqlite+aiosqlite:///<path> or "
                "postgresql+asyncpg://<user>:<password>@<host>:<port>/<name>, "
                "with what is special in a URL escaped in the password, such as %40 for @"
            )
        return url


def _is_known(url: str) -> bool:
    if not url or url.startswith("sqlite+aiosqlite:///"):
        return True
    if not url.startswith("postgresql+asyncpg://"):
        return False
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return False
    # An @ that is not escaped ends up in the host.
    return bool(parsed.database and parsed.host) and "@" not in (parsed.host or "")
