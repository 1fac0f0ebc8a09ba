"""How an S3 server is reached: TLS, and a server that is slow or loses its bucket."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.s3_blobs import S3BlobStore
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.store.service import store_config
from adaptermesh.store.settings import StoreSettings
from tests.certificates import Certificate, make_certificate
from tests.s3_server import BUCKET, S3Server, s3_server

CONTENT = bytes(range(256)) * 24_000
DIGEST = digest_bytes(CONTENT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificate: Certificate) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3-tls"), certificate) as server:
        yield server


@asynccontextmanager
async def opened(config: S3Config) -> AsyncIterator[S3BlobStore]:
    blobs = S3BlobStore(config)
    try:
        await blobs.recover()
        yield blobs
    finally:
        await blobs.close()


async def refusal(config: S3Config) -> MeshError:
    with pytest.raises(MeshError) as caught:
        async with opened(replace(config, retries=0)):
            pass
    return caught.value


async def test_blobs_go_over_tls_to_a_server_whose_authority_is_given(
    tls_server: S3Server, source: Path
) -> None:
    async with opened(tls_server.config()) as blobs:
        await blobs.put(DIGEST, source)
        assert await whole(blobs) == CONTENT
        assert [blob.digest async for blob in blobs.scan()] == [DIGEST]
        await blobs.delete(DIGEST)
        assert await blobs.stat(DIGEST) is None


async def test_a_certificate_that_nobody_trusted_vouches_for_is_refused_and_said(
    tls_server: S3Server, tmp_path: Path
) -> None:
    for ca_file in ("", str(make_certificate(tmp_path).authority)):
        found = await refusal(replace(tls_server.config(), ca_file=ca_file))
        assert (found.code, found.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
        assert "can't be trusted over TLS: its certificate is refused, " in found.message
        assert tls_server.endpoint in found.message


async def test_a_certificate_of_another_host_is_refused(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path / "certificate", host="127.0.0.2")
    server = S3Server(tmp_path / "s3", certificate)
    async with refusing_tls(certificate) as endpoint:
        found = await refusal(replace(server.config(), endpoint=endpoint))
    assert "certificate is not valid for '127.0.0.1'" in found.message


@asynccontextmanager
async def refusing_tls(certificate: Certificate) -> AsyncIterator[str]:
    """A server that has a certificate and nothing else."""
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.certificate, certificate.private_key)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=context) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_server_without_tls_is_not_talked_to_in_the_clear(s3_server: S3Server) -> None:
    found = await refusal(replace(s3_server.config(), secure=True))
    assert "can't be trusted over TLS: " in found.message


async def test_a_server_with_tls_that_is_called_without_refuses_that(tls_server: S3Server) -> None:
    found = await refusal(replace(tls_server.config(), secure=False))
    assert "answers BadRequest" in found.message


def test_the_setting_names_a_file_of_certificates(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERMESH_STORE_S3_ENDPOINT", "s3:9000")
    monkeypatch.setenv("ADAPTERMESH_STORE_S3_CA_FILE", str(certificate.authority))
    s3 = store_config(StoreSettings()).s3
    assert s3 is not None
    assert s3.ca_file == str(certificate.authority)
    for wrong in (certificate.private_key, certificate.authority / "x", certificate.authority.parent):
        monkeypatch.setenv("ADAPTERMESH_STORE_S3_CA_FILE", str(wrong))
        with pytest.raises(ValidationError, match="no PEM file of certificates"):
            StoreSettings()


async def whole(blobs: S3BlobStore) -> bytes:
    async with blobs.open(DIGEST) as reader:
        return await reader.read(0, reader.size)


async def test_a_bucket_that_is_removed_meanwhile_is_said_at_once(tmp_path: Path, source: Path) -> None:
    with s3_server(tmp_path / "s3") as server:
        async with opened(server.config()) as blobs:
            await blobs.put(DIGEST, source)
            async with blobs.open(DIGEST) as reader:
                remove_bucket(server)
                calls = (lambda: reader.read(0, 10), lambda: whole(blobs), lambda: collect(blobs))
                for call in (*calls, lambda: blobs.delete(DIGEST), lambda: blobs.unfinished(0)):
                    with pytest.raises(MeshError) as caught:
                        await call()
                    assert (caught.value.code, caught.value.reason) == (
                        Code.UNAVAILABLE,
                        Reason.STORE_UNREACHABLE,
                    )
                    assert caught.value.message.endswith(f"has no bucket '{BUCKET}'")
                    assert caught.value.retry_after


def remove_bucket(server: S3Server) -> None:
    client = server.client()
    for entry in client.list_objects(BUCKET, recursive=True):
        client.remove_object(BUCKET, str(entry.object_name))
    client.remove_bucket(BUCKET)


async def collect(blobs: S3BlobStore) -> None:
    async for _ in blobs.scan():
        pass


class Slow:
    """Stands before a server, and passes on so many bytes a second of what it answers."""

    def __init__(self, target: str, rate: int) -> None:
        self._host, _, self._port = target.partition(":")
        self.rate = rate
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, int(self._port))
        sending = asyncio.create_task(self._forward(reader, back, slow=False))
        try:
            await self._forward(there, writer, slow=True)
        finally:
            sending.cancel()
            for stream in (back, writer):
                stream.transport.abort()

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, slow: bool) -> None:
        with suppress(ConnectionError):
            while data := await source.read(1024 if slow else 65536):
                sink.write(data)
                await sink.drain()
                if slow:
                    # What is tested is slowness.
                    await asyncio.sleep(len(data) / self.rate)


async def test_a_server_that_trickles_is_given_up_within_the_bound_and_the_store_goes_on(
    s3_server: S3Server, source: Path
) -> None:
    config = s3_server.config()
    async with opened(config) as blobs:
        await blobs.put(DIGEST, source)
    slow = Slow(s3_server.endpoint, rate=10**9)
    # Its silence is never long, so only the whole wait has an end.
    patient = replace(config, read_seconds=5.0, wait_seconds=0.5, retries=0)
    async with (
        slow.listening() as endpoint,
        opened(replace(patient, endpoint=endpoint)) as blobs,
        blobs.open(DIGEST) as reader,
    ):
        slow.rate = 10_000
        begun = time.monotonic()
        with pytest.raises(MeshError, match="does not answer in time") as caught:
            await reader.read(0, 2**20)
        assert caught.value.reason is Reason.STORE_UNREACHABLE
        assert caught.value.retry_after
        # Two orders of magnitude less than the bytes would have taken.
        assert time.monotonic() - begun < 60
        slow.rate = 10**9
        assert await blobs.stat(DIGEST) is not None
