"""What the database keeps of an upload in parts."""

from typing import Any

from adaptermesh.core.digests import digest_bytes
from adaptermesh.store.headers import UploadHeader
from adaptermesh.store.session_rows import header_from_json, header_to_json
from adaptermesh.store.wire import header_from


def test_a_header_is_the_same_after_it_was_kept(kit: Any) -> None:
    header: UploadHeader = header_from(
        kit.make_header(
            kit.make_files(rank=8), tags=["a"], parents=[digest_bytes(b"x")], task="ner", author="é"
        )
    )
    assert header_from_json(header_to_json(header)) == header
