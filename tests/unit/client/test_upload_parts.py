from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.client import MeshError, SourceFile
from adaptermesh.client.source_folder import FolderFile
from adaptermesh.client.upload_parts import Part, missing_parts, read_part, received_bytes

SIZE = 100


def folder_file(path: str, size: int, location: Path = Path("nowhere")) -> FolderFile:
    return FolderFile(location, SourceFile(path, size, ""))


@given(received=st.sets(st.integers(0, SIZE - 1)), most_bytes=st.integers(1, 30))
def test_parts_are_exactly_the_bytes_that_are_not_there(received: set[int], most_bytes: int) -> None:
    ranges: list[tuple[int, int]] = []
    for at in sorted(received):
        if ranges and sum(ranges[-1]) == at:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((at, 1))
    files = [folder_file("a", SIZE), folder_file("empty", 0), folder_file("b", 7)]
    parts = list(missing_parts(files, {"a": ranges}, most_bytes))
    assert all(1 <= part.size_bytes <= most_bytes for part in parts)
    sent = [
        (part.file.source.path, at)
        for part in parts
        for at in range(part.offset, part.offset + part.size_bytes)
    ]
    assert sent == [("a", at) for at in range(SIZE) if at not in received] + [("b", at) for at in range(7)]
    assert received_bytes({"a": ranges}) == len(received)


def test_a_file_that_has_become_shorter_is_not_sent(tmp_path: Path) -> None:
    location = tmp_path / "file"
    location.write_bytes(b"short")
    with pytest.raises(MeshError, match="has become shorter"):
        read_part(Part(folder_file("file", 10, location), 3, 7))
