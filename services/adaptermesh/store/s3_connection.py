"""Calls to an S3 server: bounded threads, timeouts, retries, and errors that say what is wrong."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3.exceptions import HTTPError, SSLError

from adaptermesh.core.errors import MeshError, Reason, unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

_STATUSES = (500, 502, 503, 504)
_ABSENT = frozenset({"NoSuchKey", "ResourceNotFound"})
_REFUSED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class S3Config:
    """Which bucket, and what a call to it may cost."""

    endpoint: str
    """host:port, or a host name for the scheme's own port."""
    bucket: str
    prefix: str = ""
    """Put before every key; several meshes may share a bucket."""
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    secure: bool = True
    ca_file: str = ""
    """The authorities that are trusted, PEM. Empty: the system's."""
    connect_seconds: float = 3.0
    read_seconds: float = 20.0
    """How long the server may be silent within one request."""
    retries: int = 3
    """Of one request, for a lost connection or an answer of 5xx."""
    part_bytes: int = 5 * 2**20
    """Larger blobs are sent in parts, of which a call of `put` holds one in memory. S3 takes none smaller."""
    read_threads: int = 8
    write_threads: int = 4
    look_threads: int = 4
    """For short requests: they never wait behind bytes."""
    wait_seconds: float = 60.0
    """How long a read or a short request may take, its wait for a thread included."""


class S3Connection:
    """One client and its threads. A call's thread is held for one request, or one blob that is sent."""

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self._http = _connections(config)
        self.client = Minio(
            config.endpoint,
            access_key=config.access_key or None,
            secret_key=config.secret_key or None,
            region=config.region,
            secure=config.secure,
            http_client=self._http,
        )
        self._reading = ThreadPoolExecutor(config.read_threads, thread_name_prefix="s3-read")
        self._writing = ThreadPoolExecutor(config.write_threads, thread_name_prefix="s3-write")
        self._looking = ThreadPoolExecutor(config.look_threads, thread_name_prefix="s3-look")

    async def read(self, job: Callable[[], T]) -> T:
        """Runs a request for bytes; raises MeshError UNAVAILABLE."""
        return await self._bounded(self._reading, job)

    async def write(self, job: Callable[[], T]) -> T:
        """Runs the requests that send a blob; raises MeshError UNAVAILABLE."""
        return await self._run(self._writing, job)

    async def look(self, job: Callable[[], T]) -> T:
        """Runs a short request; raises MeshError UNAVAILABLE."""
        return await self._bounded(self._looking, job)

    async def finish(self, job: Callable[[], T]) -> T:
        """A short request that has ended when this returns, also by an error; raises MeshError UNAVAILABLE.

        It is bounded by its timeouts only: nobody may go on who would be surprised by its late effect.
        """
        return await self._run(self._looking, job)

    def no_bucket(self) -> MeshError:
        """UNAVAILABLE: a bucket that was there may come back, with everything in it."""
        return self._away(f"has no bucket '{self.config.bucket}'")

    def close(self) -> None:
        """Takes nothing new; a request that runs ends within its timeouts."""
        for threads in (self._reading, self._writing, self._looking):
            threads.shutdown(wait=False, cancel_futures=True)
        self._http.clear()

    async def _bounded(self, threads: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self.config.wait_seconds):
                return await self._run(threads, job)
        except TimeoutError as error:
            raise self._away("does not answer in time") from error

    async def _run(self, threads: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, job)
        except (S3Error, InvalidResponseError, ServerError, HTTPError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> MeshError:
        """What a failed request means to a caller: to come back. The log has the server's own words."""
        detail = f"{error.code}: {error.message}" if isinstance(error, S3Error) else str(error)
        log.warning("S3 request failed", extra={"endpoint": self.config.endpoint, "detail": detail[:500]})
        if isinstance(error, S3Error) and error.code == "NoSuchBucket":
            return self.no_bucket()
        if isinstance(error, S3Error) and error.code in _REFUSED:
            what = f"refuses the store's credentials ({error.code})"
        elif isinstance(error, S3Error):
            what = f"answers {error.code}"
        elif isinstance(error, InvalidResponseError | ServerError):
            what = "does not answer as an S3 server does"
        elif isinstance(cause := getattr(error, "reason", error), SSLError):
            what = f"can't be trusted over TLS: {_tls_problem(cause)}"
        else:
            what = "does not answer"
        return self._away(what)

    def _away(self, what: str) -> MeshError:
        message = f"the S3 server at {self.config.endpoint} {what}"
        return unavailable(Reason.STORE_UNREACHABLE, message, _RETRY_SECONDS, endpoint=self.config.endpoint)


def is_absent(error: S3Error) -> bool:
    """Whether the answer was that there is no such object."""
    return error.code in _ABSENT


def _tls_problem(error: SSLError) -> str:
    """What a person can act on, without the library's own wrapping."""
    found = error.args[0] if error.args else error
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"its certificate is refused, {found.verify_message}"
    return str(getattr(found, "reason", None) or found)[:200]


def _connections(config: S3Config) -> urllib3.PoolManager:
    retries = urllib3.Retry(
        total=config.retries,
        backoff_factor=0.1,
        backoff_jitter=0.2,
        backoff_max=2.0,
        status_forcelist=_STATUSES,
        raise_on_status=False,
        # How long to wait is ours to say: a thread is waiting.
        respect_retry_after_header=False,
    )
    return urllib3.PoolManager(
        maxsize=config.read_threads + config.write_threads + config.look_threads,
        timeout=urllib3.Timeout(connect=config.connect_seconds, read=config.read_seconds),
        retries=retries,
        cert_reqs="CERT_REQUIRED",
        # None: the authorities that the system trusts.
        ca_certs=config.ca_file or None,
    )
