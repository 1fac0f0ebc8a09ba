"""Blobs as objects of an S3 bucket, which several stores may share."""

import datetime
import hashlib
import io
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from minio.datatypes import Object
from minio.error import S3Error

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.store.blob_reading import corrupt_blob
from adaptermesh.store.blobs import StoredBlob
from adaptermesh.store.s3_connection import S3Config, S3Connection, is_absent
from adaptermesh.store.s3_reading import ObjectReader, read_whole

_PREFIX = "sha256:"
_PAGE = 1000
_PUT_ATTEMPTS = 2

_Unfinished = tuple[str, str]
"""Key and id of a multipart upload."""


class S3BlobStore:
    """Blobs as objects `<prefix>sha256/<2 digits>/<62 digits>`: the names of the folder backend.

    A blob is sent to its final key straight away. An S3 object appears whole or not at all, so a temporary
    key and a copy would add nothing: a small blob is one PUT, a large one appears when its parts are
    completed, and that is asked for only after all bytes that went out had the right digest. On the way each
    request is signed with the sha256 of its body (over TLS: checked by its MD5), which the server verifies.
    """

    def __init__(self, config: S3Config) -> None:
        self._connection = S3Connection(config)
        self._client = self._connection.client
        self._bucket = config.bucket
        self._prefix = f"{config.prefix.strip('/')}/" if config.prefix.strip("/") else ""
        self._part_bytes = config.part_bytes

    async def recover(self) -> None:
        """Nothing to remove: what a crash left can't be told from what another store is at work on."""
        await self._connection.look(self._try_out)

    async def close(self) -> None:
        self._connection.close()

    async def put(self, digest: str, source: Path) -> None:
        key = self._key(digest)
        for attempt in range(_PUT_ATTEMPTS):
            try:
                await self._connection.write(lambda: self._put(digest, key, source))
            except _UploadGone as error:
                # Another store's garbage collection may have aborted it: then it was older than the grace.
                if attempt + 1 == _PUT_ATTEMPTS:
                    raise unavailable(Reason.STORE_UNREACHABLE, str(error), 1.0) from error
            else:
                return

    @asynccontextmanager
    async def open(self, digest: str) -> AsyncIterator[ObjectReader]:
        key = self._key(digest)
        found = await self.stat(digest)
        if found is None:
            await self._connection.look(self._check_bucket)
            raise corrupt_blob(digest, "it is missing")
        yield ObjectReader(self._connection, key, found)

    async def get(self, digest: str, most_bytes: int) -> bytes:
        key = self._key(digest)
        return await read_whole(self._connection, key, digest, most_bytes)

    async def stat(self, digest: str) -> StoredBlob | None:
        key = self._key(digest)
        found = await self._connection.look(lambda: self._stat(key))
        return None if found is None else _stored(digest, found)

    async def scan(self) -> AsyncGenerator[StoredBlob]:
        start = f"{self._prefix}sha256/"
        found = self._client.list_objects(self._bucket, prefix=start, recursive=True)
        while page := await self._connection.look(lambda: [*islice(found, _PAGE)]):
            for entry in page:
                digest = _PREFIX + str(entry.object_name).removeprefix(start).replace("/", "", 1)
                if is_digest(digest):
                    yield _stored(digest, entry)

    async def delete(self, digest: str) -> None:
        key = self._key(digest)
        await self._connection.finish(lambda: self._client.remove_object(self._bucket, key))

    async def unfinished(self, before: float) -> int:
        return len(await self._connection.look(lambda: self._unfinished(before)))

    async def discard_unfinished(self, before: float) -> int:
        left = await self._connection.look(lambda: self._unfinished(before))
        for upload in left:
            await self._connection.look(partial(self._abort, *upload))
        return len(left)

    def _key(self, digest: str) -> str:
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest!r}")
        digits = digest.removeprefix(_PREFIX)
        return f"{self._prefix}sha256/{digits[:2]}/{digits[2:]}"

    def _try_out(self) -> None:
        """Looks whether the bucket takes objects. First whether it is there: some servers would make it."""
        if not self._client.bucket_exists(self._bucket):
            message = f"the S3 server at {self._connection.config.endpoint} has no bucket '{self._bucket}'"
            raise MeshError(Code.FAILED_PRECONDITION, Reason.STORE_UNREACHABLE, message)
        key = f"{self._prefix}probe-{uuid.uuid4().hex}"
        self._client.put_object(self._bucket, key, io.BytesIO(b"writable"), 8)
        self._client.remove_object(self._bucket, key)

    def _check_bucket(self) -> None:
        """An answer to HEAD has no body: that an object is absent may mean that its bucket is."""
        if not self._client.bucket_exists(self._bucket):
            raise self._connection.no_bucket()

    def _stat(self, key: str) -> Object | None:
        try:
            return self._client.stat_object(self._bucket, key)
        except S3Error as error:
            if is_absent(error):
                return None
            raise

    def _put(self, digest: str, key: str, source: Path) -> None:
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            there = self._stat(key)
            if there is not None and there.size == size:
                return
            try:
                self._client.put_object(
                    self._bucket,
                    key,
                    _Verified(file, size, digest),  # type: ignore[arg-type]  # it is only read
                    size,
                    part_size=self._part_bytes,
                    num_parallel_uploads=1,
                )
            except S3Error as error:
                if error.code == "NoSuchUpload":
                    raise _UploadGone(f"the upload of blob {digest} was aborted on the server") from error
                raise
        there = self._stat(key)
        if there is None or there.size != size:
            raise corrupt_blob(digest, "the S3 server does not have what it has acknowledged")

    def _unfinished(self, before: float) -> list[_Unfinished]:
        """Multipart uploads below the prefix. The client has the calls, though not under public names."""
        found: list[_Unfinished] = []
        key_marker, id_marker = None, None
        while True:
            page = self._client._list_multipart_uploads(
                self._bucket,
                prefix=f"{self._prefix}sha256/",
                key_marker=key_marker,
                upload_id_marker=id_marker,
            )
            for upload in page.uploads:
                began = upload.initiated_time
                if upload.upload_id and began is not None and began.timestamp() < before:
                    found.append((upload.object_name, upload.upload_id))
            if not page.is_truncated or not page.next_key_marker:
                return found
            key_marker, id_marker = page.next_key_marker, page.next_upload_id_marker

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._client._abort_multipart_upload(self._bucket, key, upload_id)
        except S3Error as error:
            if error.code != "NoSuchUpload":
                raise


class _Verified:
    """A file that is sent. Its last bytes are handed out only if all of them have the digest."""

    def __init__(self, file: BinaryIO, size: int, digest: str) -> None:
        self._file = file
        self._left = size
        self._expected = digest
        self._found = hashlib.sha256()
        if size == 0:
            self._check()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._found.update(data)
        self._left -= len(data)
        if self._left == 0 or not data:
            self._check()
        return data

    def _check(self) -> None:
        if f"{_PREFIX}{self._found.hexdigest()}" != self._expected:
            raise corrupt_blob(self._expected, "what was to be kept has another digest")


class _UploadGone(Exception):
    """A multipart upload was aborted by somebody else."""


def _stored(digest: str, found: Object) -> StoredBlob:
    time = found.last_modified or datetime.datetime.now(datetime.UTC)
    return StoredBlob(digest, found.size or 0, time.timestamp())
