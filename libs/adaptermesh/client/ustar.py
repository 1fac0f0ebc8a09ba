"""A strict reader of plain tar files: regular files only, every number checked before it is used.

It never writes, so no entry's name becomes a path. Of what POSIX lets an archive say it takes an entry's
path, where that is too long or not ASCII; links, devices, folders, sparse files and everything else are
refused.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from adaptermesh.core.errors import Code, MeshError, Reason

BLOCK = 512
MAX_PAX_BYTES = 4096
"""An extended header holds one path."""
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file in an archive: where its bytes are."""

    path: str
    offset: int
    size: int


def entries(archive: BinaryIO, max_entries: int) -> Iterator[Entry]:
    """The files of an archive, in their order; blocks.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD) for whatever is not a plain tar of regular files.
    """
    length = archive.seek(0, os.SEEK_END)
    offset = count = 0
    path: str | None = None
    while True:
        header = _read(archive, offset, BLOCK, length)
        if not any(header):
            if path is not None:
                raise damaged("an extended header is followed by nothing")
            return
        entry, kind = _entry(header, offset + BLOCK)
        if entry.offset + entry.size > length:
            raise damaged(f"the entry {entry.path[:80]!r} goes past the end of the file")
        if kind == b"x":
            if path is not None or entry.size > MAX_PAX_BYTES:
                raise damaged("an extended header is too long, or follows another one")
            path = _pax_path(_read(archive, entry.offset, entry.size, length))
        else:
            count += 1
            if count > max_entries:
                raise damaged(f"it has more than {max_entries} files")
            yield entry if path is None else Entry(path, entry.offset, entry.size)
            path = None
        offset = entry.offset + -(-entry.size // BLOCK) * BLOCK


def damaged(problem: str) -> MeshError:
    """INVALID_ARGUMENT (INVALID_UPLOAD)."""
    return MeshError(
        Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD, f"this is no tar of an exported version: {problem}"
    )


def _entry(header: bytes, data: int) -> tuple[Entry, bytes]:
    if header[257:263] != b"ustar\0":
        raise damaged("a header of a tar is missing, or the file is compressed")
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _octal(header[148:156]) != unsigned:
        raise damaged("a header has a wrong checksum")
    kind = header[156:157]
    name, prefix = _text(header[:100]), _text(header[345:500])
    path = f"{prefix}/{name}" if prefix else name
    if kind not in (b"0", b"x"):
        raise damaged(f"the entry {path[:80]!r} is {_KINDS.get(kind, 'of a kind that has no place in it')}")
    return Entry(path, data, _octal(header[124:136])), kind


def _octal(field: bytes) -> int:
    """A number in octal digits; never negative, never more than the field can hold."""
    digits = field.rstrip(b" \0")
    if not digits or any(digit not in b"01234567" for digit in digits):
        raise damaged("a number in a header is none")
    return int(digits, 8)


def _text(field: bytes) -> str:
    text, _, rest = field.partition(b"\0")
    try:
        return text.decode("ascii") if not any(rest) else ""
    except UnicodeDecodeError:
        raise damaged("a name in a header is not ASCII") from None


def _pax_path(data: bytes) -> str:
    """The one record that is taken: `LENGTH path=VALUE`, and a line's end."""
    digits, space, rest = data.partition(b" ")
    key, equals, value = rest.partition(b"=")
    whole = space and equals and digits.isdigit() and len(digits) < 5 and int(digits) == len(data)
    if not whole or key != b"path" or not value.endswith(b"\n"):
        raise damaged("an extended header says more than a path")
    try:
        return value[:-1].decode("utf-8")
    except UnicodeDecodeError:
        raise damaged("a path is not UTF-8") from None


def _read(archive: BinaryIO, offset: int, size: int, length: int) -> bytes:
    if offset + size > length:
        raise damaged("it ends in the middle")
    archive.seek(offset)
    return archive.read(size)
