import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from minio.error import S3Error

from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.s3_blobs import S3BlobStore
from adaptermesh.store.s3_connection import S3Config
from adaptermesh.testing.polling import eventually
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, free_ports
from tests.s3_server import s3_server as running_server

CONTENT = bytes(range(256)) * 50_000
DIGEST = digest_bytes(CONTENT)
PART = 5 * 2**20


@asynccontextmanager
async def opened(config: S3Config) -> AsyncIterator[S3BlobStore]:
    blobs = S3BlobStore(config)
    try:
        await blobs.recover()
        yield blobs
    finally:
        await blobs.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def fragile_server(tmp_path: Path) -> Iterator[S3Server]:
    """A server for one test alone, which may kill it."""
    with running_server(tmp_path / "fragile-s3") as server:
        yield server


def key(config: S3Config, digest: str) -> str:
    digits = digest.removeprefix("sha256:")
    return f"{config.prefix}/sha256/{digits[:2]}/{digits[2:]}"


async def whole(blobs: S3BlobStore, digest: str) -> bytes:
    async with blobs.open(digest) as reader:
        return await reader.read(0, reader.size)


async def test_a_bucket_that_is_not_there_is_said_and_not_made(s3_server: S3Server) -> None:
    config = replace(s3_server.config(), bucket="nowhere")
    with pytest.raises(MeshError, match="has no bucket 'nowhere'"):
        async with opened(config):
            pass
    assert not s3_server.client().bucket_exists("nowhere")


@pytest.mark.parametrize(
    ("access_key", "secret_key"), [(ACCESS_KEY, "another-secret"), ("nobody", SECRET_KEY)]
)
async def test_credentials_that_are_refused_are_said_and_never_shown(
    s3_server: S3Server, caplog: pytest.LogCaptureFixture, access_key: str, secret_key: str
) -> None:
    config = replace(s3_server.config(), access_key=access_key, secret_key=secret_key)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(MeshError, match="refuses the store's credentials") as e,
    ):
        async with opened(config):
            pass
    assert e.value.code is Code.UNAVAILABLE
    seen = repr(config) + repr(e.value) + str([vars(record) for record in caplog.records])
    assert secret_key not in seen


async def test_a_server_that_is_not_there_is_said_with_its_address() -> None:
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(MeshError, match=f"{endpoint} does not answer") as caught:
        async with opened(S3Config(endpoint, BUCKET, secure=False)):
            pass
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, Reason.STORE_UNREACHABLE)
    assert caught.value.retry_after


async def test_a_start_leaves_nothing_behind(s3_server: S3Server) -> None:
    config = s3_server.config()
    async with opened(config):
        pass
    assert list(s3_server.client().list_objects(BUCKET, prefix=config.prefix, recursive=True)) == []


async def test_the_second_store_finds_what_the_first_has_put_and_sends_nothing(
    s3_server: S3Server, source: Path
) -> None:
    config = s3_server.config()
    async with opened(config) as first, opened(config) as second:
        await first.put(DIGEST, source)
        before = s3_server.client().stat_object(BUCKET, key(config, DIGEST))
        await second.put(DIGEST, source)
        after = s3_server.client().stat_object(BUCKET, key(config, DIGEST))
        assert (after.etag, after.last_modified) == (before.etag, before.last_modified)
        assert await whole(second, DIGEST) == CONTENT


async def test_an_object_of_another_size_is_put_again(s3_server: S3Server, source: Path) -> None:
    config = s3_server.config()
    other = source.with_name("other")
    await asyncio.to_thread(other.write_bytes, b"cut")
    async with opened(config) as blobs:
        await asyncio.to_thread(s3_server.client().fput_object, BUCKET, key(config, DIGEST), str(other))
        await blobs.put(DIGEST, source)
        assert await whole(blobs, DIGEST) == CONTENT


async def test_large_content_with_another_digest_leaves_neither_object_nor_parts(
    s3_server: S3Server, source: Path
) -> None:
    config = replace(s3_server.config(), part_bytes=PART)
    wrong = digest_bytes(b"something else")
    async with opened(config) as blobs:
        with pytest.raises(MeshError) as caught:
            await blobs.put(wrong, source)
        assert caught.value.reason is Reason.DATA_CORRUPT
        assert await blobs.stat(wrong) is None
        assert await blobs.unfinished(time.time() + 10) == 0


async def test_parts_of_a_put_that_a_crash_cut_off_are_discarded_when_they_are_old(
    s3_server: S3Server,
) -> None:
    config, other = s3_server.config(), s3_server.config()
    client = s3_server.client()
    for owner in (config, other):
        name = key(owner, DIGEST)
        upload = client._create_multipart_upload(BUCKET, name, {})
        client._upload_part(BUCKET, name, CONTENT[:PART], {}, upload, 1)
    async with opened(config) as blobs, opened(other) as others:
        assert await blobs.discard_unfinished(time.time() - 60) == 0
        assert await blobs.unfinished(time.time() + 10) == 1
        assert await blobs.discard_unfinished(time.time() + 10) == 1
        assert await blobs.unfinished(time.time() + 10) == 0
        assert await others.unfinished(time.time() + 10) == 1


async def test_a_put_whose_parts_were_discarded_meanwhile_begins_again(
    s3_server: S3Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(s3_server.config(), part_bytes=PART)
    async with opened(config) as blobs:
        client, upload_part = blobs._client, blobs._client._upload_part
        aborted: list[tuple[str, str]] = []

        def abort_once(*args: object) -> str:
            if not aborted:
                (found,) = blobs._unfinished(time.time() + 10)
                aborted.append(found)
                blobs._abort(*found)
            return str(upload_part(*args))  # type: ignore[arg-type]

        monkeypatch.setattr(client, "_upload_part", abort_once)
        await blobs.put(DIGEST, source)
        assert aborted
        assert await whole(blobs, DIGEST) == CONTENT


async def test_a_server_that_is_away_is_worth_a_retry_and_has_everything_when_it_is_back(
    fragile_server: S3Server, source: Path
) -> None:
    async with opened(replace(fragile_server.config(), retries=1)) as blobs:
        await blobs.put(DIGEST, source)
        async with blobs.open(DIGEST) as reader:
            await asyncio.to_thread(fragile_server.kill)
            other = digest_bytes(b"")
            for call in (
                reader.read(0, 10),
                blobs.stat(DIGEST),
                blobs.put(other, source),
                whole(blobs, DIGEST),
            ):
                with pytest.raises(MeshError) as caught:
                    await call
                assert (caught.value.code, caught.value.reason) == (
                    Code.UNAVAILABLE,
                    Reason.STORE_UNREACHABLE,
                )
                assert caught.value.retry_after
            await asyncio.to_thread(fragile_server.start)

            async def read_again() -> bytes | None:
                try:
                    return await reader.read(5, 10)
                except MeshError as error:
                    # Its parts come back one after the other.
                    assert error.code is Code.UNAVAILABLE
                    return None

            assert await eventually(read_again) == CONTENT[5:15]
        assert await whole(blobs, DIGEST) == CONTENT


class Cutter:
    """Stands before a server. Cuts the first connections after so many bytes of the answer."""

    def __init__(self, target: str, after: int) -> None:
        self._host, _, self._port = target.partition(":")
        self._after = after
        self._connections: set[asyncio.Task[None]] = set()
        self.cuts_left = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its own address."""
        async with await asyncio.start_server(self._connected, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, int(self._port))
        most = self._after if self.cuts_left > 0 else None
        self.cuts_left -= 1
        sending = asyncio.create_task(self._forward(reader, back, None))
        try:
            await self._forward(there, writer, most)
        finally:
            sending.cancel()
            for stream in (back, writer):
                stream.transport.abort()

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, most: int | None
    ) -> None:
        done = 0
        with suppress(ConnectionError):
            while (data := await source.read(65536)) and (most is None or done < most):
                sink.write(data)
                await sink.drain()
                done += len(data)


@pytest.mark.parametrize("after", [1, 300_000])
async def test_a_connection_that_is_lost_is_tried_again(
    s3_server: S3Server, source: Path, after: int
) -> None:
    config = s3_server.config()
    async with opened(config) as blobs:
        await blobs.put(DIGEST, source)
    cutter = Cutter(s3_server.endpoint, after)
    async with (
        cutter.listening() as endpoint,
        opened(replace(config, endpoint=endpoint)) as blobs,
        blobs.open(DIGEST) as reader,
    ):
        # The kept connection must go first: only new ones are cut.
        blobs._connection._http.clear()
        cutter.cuts_left = 2
        assert await reader.read(7, 2_000_000) == CONTENT[7:2_000_007]
        assert cutter.cuts_left <= 0


async def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        config = S3Config(f"127.0.0.1:{port}", BUCKET, secure=False, retries=0, read_seconds=0.2)
        for patient in (config, replace(config, read_seconds=2, wait_seconds=0.2)):
            with pytest.raises(MeshError, match="does not answer") as caught:
                async with opened(patient):
                    pass
            assert caught.value.reason is Reason.STORE_UNREACHABLE


async def test_objects_that_are_no_blobs_are_left_alone(s3_server: S3Server, source: Path) -> None:
    config = s3_server.config()
    for name in ("sha256/readme", "sha256/ab/cd", "other/file"):
        await asyncio.to_thread(
            s3_server.client().fput_object, BUCKET, f"{config.prefix}/{name}", str(source)
        )
    async with opened(config) as blobs:
        await blobs.put(DIGEST, source)
        assert [blob.digest async for blob in blobs.scan()] == [DIGEST]


async def test_an_object_that_is_gone_or_cut_under_a_reader_is_corrupt(
    s3_server: S3Server, source: Path
) -> None:
    config = s3_server.config()
    cut = source.with_name("cut")
    await asyncio.to_thread(cut.write_bytes, CONTENT[:1000])
    async with opened(config) as blobs:
        await blobs.put(DIGEST, source)
        async with blobs.open(DIGEST) as reader:
            await asyncio.to_thread(s3_server.client().fput_object, BUCKET, key(config, DIGEST), str(cut))
            for offset, size in ((0, 2000), (5000, 10)):
                with pytest.raises(MeshError) as caught:
                    await reader.read(offset, size)
                assert caught.value.reason is Reason.DATA_CORRUPT
            await blobs.delete(DIGEST)
            with pytest.raises(MeshError, match="it is missing"):
                await reader.read(0, 10)
        with pytest.raises(S3Error):
            s3_server.client().stat_object(BUCKET, key(config, DIGEST))
