"""Which bytes of an upload have been received in parts, and which are missing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.headers import UploadHeader, invalid_upload
from adaptermesh.store.records import SourceFile

MAX_PART_BYTES = 8 * 2**20
_BYTES_FOR_A_PART = 512 * 2**10

ByteRange = tuple[int, int]
"""An offset and a size."""


@dataclass(frozen=True, slots=True, order=True)
class UploadPart:
    """Bytes of one file, by its place in the header's order."""

    file_index: int
    offset: int
    size_bytes: int
    digest: str

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes

    def overlaps(self, other: "UploadPart") -> bool:
        same = self.file_index == other.file_index
        return same and self.offset < other.end and other.offset < self.end


def most_parts(header: UploadHeader) -> int:
    """How many parts an upload may have: enough for any client that means well."""
    return 16 + 2 * len(header.files) + header.size_bytes // _BYTES_FOR_A_PART


def find_source(header: UploadHeader, path: str) -> tuple[int, SourceFile]:
    """A file of the header and its index; raises MeshError INVALID_UPLOAD."""
    for index, file in enumerate(header.files):
        if file.path == path:
            return index, file
    raise invalid_upload(f"the upload has no file {path[:255]!r}", file=path[:255])


def check_bounds(part: UploadPart, file: SourceFile) -> None:
    """Raises MeshError INVALID_UPLOAD unless the part lies inside its file and has a legal size."""
    if not 1 <= part.size_bytes <= MAX_PART_BYTES:
        raise invalid_upload(
            f"a part has 1 to {MAX_PART_BYTES} bytes, this one has {part.size_bytes}", file=file.path
        )
    if part.offset < 0 or part.end > file.size_bytes:
        raise invalid_upload(
            f"bytes {part.offset} to {part.end} are not inside file '{file.path}', "
            f"which has {file.size_bytes} bytes",
            file=file.path,
        )


def is_known(part: UploadPart, others: Sequence[UploadPart]) -> bool:
    """Whether this very part is there already.

    Raises:
        MeshError: UPLOAD_CONFLICT if it overlaps another one.
    """
    for other in others:
        if other == part:
            return True
        if part.overlaps(other):
            raise upload_conflict(
                f"bytes {part.offset} to {part.end} overlap a part that is there, "
                f"bytes {other.offset} to {other.end}"
                + (", with other content" if other.digest != part.digest else ""),
                offset=str(other.offset),
                size_bytes=str(other.size_bytes),
                digest=other.digest,
            )
    return False


def received_ranges(parts: Sequence[UploadPart], file_index: int) -> tuple[ByteRange, ...]:
    """What is there of one file; parts that follow each other without a gap are one range."""
    ranges: list[ByteRange] = []
    for part in sorted(part for part in parts if part.file_index == file_index):
        if ranges and sum(ranges[-1]) == part.offset:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + part.size_bytes)
        else:
            ranges.append((part.offset, part.size_bytes))
    return tuple(ranges)


def missing_ranges(header: UploadHeader, parts: Sequence[UploadPart]) -> Iterator[tuple[str, ByteRange]]:
    """What is still to come, with the path of its file."""
    for index, file in enumerate(header.files):
        end = 0
        for offset, size in received_ranges(parts, index):
            if end < offset:
                yield file.path, (end, offset - end)
            end = offset + size
        if end < file.size_bytes:
            yield file.path, (end, file.size_bytes - end)


def check_whole(header: UploadHeader, parts: Sequence[UploadPart]) -> None:
    """Raises MeshError UPLOAD_INCOMPLETE, with the first gap, if bytes are missing."""
    missing = list(missing_ranges(header, parts))
    if missing:
        path, (offset, size) = missing[0]
        total = sum(size for _, (_, size) in missing)
        raise MeshError(
            Code.FAILED_PRECONDITION,
            Reason.UPLOAD_INCOMPLETE,
            f"{total} bytes are missing, the first are bytes {offset} to {offset + size} of file '{path}'",
            metadata={
                "file": path,
                "offset": str(offset),
                "size_bytes": str(size),
                "missing_bytes": str(total),
            },
        )


def upload_conflict(message: str, **metadata: str) -> MeshError:
    """FAILED_PRECONDITION (UPLOAD_CONFLICT)."""
    return MeshError(Code.FAILED_PRECONDITION, Reason.UPLOAD_CONFLICT, message, metadata=metadata)
