"""The strict reader of tar files: what it takes, and everything else."""

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.client.ustar import MAX_PAX_BYTES, entries
from adaptermesh.core.errors import Code, MeshError, Reason

LONG = "source/" + "/".join(["folder"] * 20) + "/ä.json"


def tar(*members: tuple[str, bytes], how: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=how) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for field, value in fields.items():
                setattr(entry, field, value)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def read(data: bytes, limit: int = 8) -> dict[str, bytes]:
    return {one.path: data[one.offset : one.offset + one.size] for one in entries(io.BytesIO(data), limit)}


def refusal(data: bytes, limit: int = 8) -> str:
    with pytest.raises(MeshError) as caught:
        read(data, limit)
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD)
    return caught.value.message


def checked(header: bytearray) -> bytes:
    """With the checksum that its bytes have."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_files_come_with_their_bytes_also_under_long_and_foreign_names() -> None:
    members = {"a.json": b"{}", "source/empty": b"", LONG: b"x" * 1025}
    assert read(tar(*members.items())) == members


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.DIRTYPE, "a folder"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (tarfile.XGLTYPE, "of a kind that has no place in it"),
    ],
)
def test_what_is_no_regular_file_is_refused_by_its_kind(kind: bytes, words: str) -> None:
    assert words in refusal(tar(("x", b""), type=kind, linkname="/etc/passwd"))


def test_archives_of_other_kinds_are_refused() -> None:
    assert "compressed" in refusal(b"\x1f\x8b" + bytes(600))
    assert "header" in refusal(tar(("a", b"x"), how=tarfile.GNU_FORMAT))
    assert "ends in the middle" in refusal(b"")
    assert "ends in the middle" in refusal(b"x" * 100)


def test_an_entry_can_not_claim_more_than_there_is() -> None:
    header = bytearray(tar(("a", b"x"))[:512])
    for digits, words in ((b"77777777777\0", "past the end"), (b"\x80" + bytes(11), "is none")):
        header[124:136] = digits
        assert words in refusal(checked(header) + bytes(1024))
    header[124:136] = b"-0000000001\0"
    assert "is none" in refusal(checked(header) + bytes(1024))


def test_a_damaged_header_is_found_by_its_checksum() -> None:
    data = bytearray(tar(("a", b"x")))
    data[0] ^= 1
    assert "checksum" in refusal(bytes(data))


def test_there_are_so_many_files_and_no_more() -> None:
    members = [(f"f{number}", b"") for number in range(9)]
    assert "more than 8 files" in refusal(tar(*members))
    assert len(read(tar(*members[:8]))) == 8


def extended(body: bytes) -> bytes:
    header = bytearray(tar(("p", body))[:512])
    header[156:157] = b"x"
    padding = bytes(-len(body) % 512)
    return checked(header) + body + padding


def test_an_extended_header_says_one_path_and_nothing_else() -> None:
    after = tar(("a", b"x"))
    assert list(read(extended(b"12 path=b/c\n") + after)) == ["b/c"]
    for body in (
        b"14 size=999999\n",
        b"22 GNU.sparse.major=1\n",
        b"12 path=b/c\n12 path=b/d\n",
        b"99 path=b/c\n",
        b"path=b/c\n",
        b"",
    ):
        assert "more than a path" in refusal(extended(body) + after)
    assert "UTF-8" in refusal(extended(b"12 path=\xff/c\n") + after)
    assert "too long" in refusal(extended(b"x" * (MAX_PAX_BYTES + 1)) + after)
    assert "follows another one" in refusal(extended(b"12 path=b/c\n") * 2 + after)
    assert "followed by nothing" in refusal(extended(b"12 path=b/c\n") + bytes(1024))


@given(st.data())
def test_whatever_is_changed_in_an_archive_it_is_read_or_refused(data: st.DataObject) -> None:
    archive = bytearray(tar(("a.json", b"{}"), (LONG, b"x" * 700)))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(archive[: data.draw(st.integers(0, len(archive)))])
    try:
        found = read(cut)
    except MeshError as error:
        assert error.reason is Reason.INVALID_UPLOAD
    else:
        assert sum(map(len, found.values())) <= len(cut)
