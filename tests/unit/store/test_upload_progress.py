"""Ranges of bytes: what is received and what is missing are the whole file."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.refs import AdapterName
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.records import SourceFile
from adaptermesh.store.session_outcomes import SessionOutcome
from adaptermesh.store.upload_progress import (
    UploadPart,
    check_whole,
    is_known,
    missing_ranges,
    received_ranges,
)

SIZES = (0, 40, 60)
HEADER = UploadHeader(
    adapter=AdapterName("acme", "ner"),
    base_model="tiny",
    task="",
    description="",
    tags=(),
    license="",
    author="",
    files=tuple(SourceFile(f"file-{size}", size, "") for size in SIZES),
    validate_only=False,
)

PARTS = st.lists(
    st.builds(
        UploadPart,
        file_index=st.sampled_from([1, 2]),
        offset=st.integers(0, 30),
        size_bytes=st.integers(1, 10),
        digest=st.sampled_from(["a", "b"]),
    ),
    max_size=20,
)


def bytes_of(part: UploadPart) -> set[tuple[int, int]]:
    return {(part.file_index, at) for at in range(part.offset, part.end)}


@given(wanted=PARTS)
def test_received_and_missing_bytes_are_the_whole_upload(wanted: list[UploadPart]) -> None:
    parts: list[UploadPart] = []
    received: set[tuple[int, int]] = set()
    for part in wanted:
        try:
            known = is_known(part, parts)
        except MeshError as error:
            assert error.reason is Reason.UPLOAD_CONFLICT
            assert bytes_of(part) & received
            continue
        assert known == (part in parts)
        if not known:
            assert not bytes_of(part) & received
            parts.append(part)
            received |= bytes_of(part)
    told = set()
    for index, size in enumerate(SIZES):
        ranges = received_ranges(parts, index)
        # Neighbours are one range.
        assert all(sum(one) < two[0] for one, two in pairwise(ranges))
        told |= {(index, at) for offset, length in ranges for at in range(offset, offset + length)}
        assert all(offset >= 0 and offset + length <= size for offset, length in ranges)
    assert told == received
    missing = {
        (HEADER.files.index(next(file for file in HEADER.files if file.path == path)), at)
        for path, (offset, length) in missing_ranges(HEADER, parts)
        for at in range(offset, offset + length)
    }
    assert not missing & received
    assert len(missing | received) == sum(SIZES)


def test_only_an_upload_without_gaps_is_whole() -> None:
    parts = [UploadPart(1, 0, 40, "a"), UploadPart(2, 0, 60, "b")]
    check_whole(HEADER, parts)
    with pytest.raises(MeshError, match="40 bytes are missing, the first are bytes 0 to 40 of"):
        check_whole(HEADER, parts[1:])


def test_an_outcome_is_the_same_after_it_was_kept() -> None:
    kept = SessionOutcome("sha256:0", created=True)
    assert SessionOutcome.from_json(kept.to_json()) == kept
    error = MeshError(Code.INVALID_ARGUMENT, Reason.ADAPTER_REJECTED, "- é" * 9000, metadata={"a": "b"})
    refusal = SessionOutcome.from_json(SessionOutcome(refusal=error).to_json()).refusal
    assert refusal is not None
    assert (refusal.code, refusal.reason, refusal.metadata) == (error.code, error.reason, {"a": "b"})
    assert error.message.startswith(refusal.message)
