"""Bytes of objects: ranges of them, or a small one as a whole, each by one request."""

from collections.abc import Callable, Sequence

from minio.error import S3Error
from urllib3.exceptions import HTTPError, MaxRetryError

from adaptermesh.store.blob_reading import HeadedRange, corrupt_blob
from adaptermesh.store.blobs import StoredBlob
from adaptermesh.store.s3_connection import S3Connection, is_absent

_ATTEMPTS = 3
# Small ranges cost the server half as much again; large ones would fill the memory of the store.
_BLOCK_BYTES = 1024 * 1024


class ObjectReader:
    """Ranges of an object. Each is one request over a kept connection, made when it is asked for.

    So a caller that is slow or goes away holds neither a thread nor a connection.
    """

    def __init__(self, connection: S3Connection, key: str, blob: StoredBlob) -> None:
        self._connection = connection
        self._object = _Object(connection, key, blob.digest)
        self._blob = blob

    @property
    def size(self) -> int:
        return self._blob.size_bytes

    @property
    def block_bytes(self) -> int:
        return _BLOCK_BYTES

    async def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise corrupt_blob(self._blob.digest, f"it ends before byte {offset + size}")
        if size == 0:
            return b""
        return await self._connection.read(lambda: self._object.range(offset, size))

    async def read_behind(self, ranges: Sequence[HeadedRange]) -> list[bytes]:
        start = ranges[0].offset
        data = memoryview(await self.read(start, ranges[-1].end - start))
        return [b"".join((one.head, data[one.offset - start : one.end - start])) for one in ranges]


async def read_whole(connection: S3Connection, key: str, digest: str, most_bytes: int) -> bytes:
    """All of an object; raises MeshError DATA_CORRUPT if there is none, or a larger one."""
    return await connection.read(lambda: _Object(connection, key, digest).whole(most_bytes))


class _Object:
    """One object; its methods block."""

    def __init__(self, connection: S3Connection, key: str, digest: str) -> None:
        self._client = connection.client
        self._bucket = connection.config.bucket
        self._key = key
        self._digest = digest

    def range(self, offset: int, size: int) -> bytes:
        def expected(length: int) -> None:
            if length != size:
                raise corrupt_blob(self._digest, f"{size} bytes from {offset} are not there")

        return self._read(offset, size, expected)

    def whole(self, most_bytes: int) -> bytes:
        def expected(length: int) -> None:
            if length > most_bytes:
                raise corrupt_blob(self._digest, f"it has more than {most_bytes} bytes")

        return self._read(0, 0, expected)

    def _read(self, offset: int, size: int, check: Callable[[int], None]) -> bytes:
        """Again if the connection was lost within the answer: that is retried nowhere else."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._get(offset, size, check)
            except MaxRetryError:
                raise
            except HTTPError:
                continue
        return self._get(offset, size, check)

    def _get(self, offset: int, size: int, check: Callable[[int], None]) -> bytes:
        try:
            response = self._client.get_object(self._bucket, self._key, offset, size)
        except S3Error as error:
            if is_absent(error):
                raise corrupt_blob(self._digest, "it is missing") from error
            if error.code == "InvalidRange":
                raise corrupt_blob(self._digest, f"it ends before byte {offset + size}") from error
            raise
        try:
            # One without a length is larger than anything.
            check(int(response.headers.get("Content-Length") or 2**63))
            data = response.read()
        except BaseException:
            response.close()
            raise
        finally:
            response.release_conn()
        return data
