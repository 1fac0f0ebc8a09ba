from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptermesh.artifact.chunking import cut, hash_spans
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out
from adaptermesh.core.digests import digest_bytes


def layered(sizes: list[tuple[int, int]]) -> Any:
    layout = lay_out([TensorSpec(f"t{i}", "U8", (size,)) for i, (size, _) in enumerate(sizes)], {})
    return list(zip(layout.entries, [layer for _, layer in sizes], strict=True)), layout.file_size


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(-1, 3)), max_size=12).map(
        lambda items: sorted(items, key=lambda item: item[1])
    ),
    chunk_bytes=st.integers(1, 500),
)
def test_chunks_cover_the_file_and_never_span_two_layers(
    sizes: list[tuple[int, int]], chunk_bytes: int
) -> None:
    tensors, file_size = layered(sizes)
    spans = cut(tensors, file_size, chunk_bytes)
    assert spans[0].offset == 0
    assert spans[0].layer == -1
    assert all(before.offset + before.size == after.offset for before, after in pairwise(spans))
    assert spans[-1].offset + spans[-1].size == file_size
    assert all(1 <= span.size <= chunk_bytes for span in spans)
    for entry, layer in tensors:
        touched = [
            span
            for span in spans
            if span.offset < entry.offset + entry.size and entry.offset < span.offset + span.size
        ]
        assert {span.layer for span in touched} == {layer}


def test_the_header_is_a_chunk_of_its_own_before_tensors_of_no_layer() -> None:
    tensors, file_size = layered([(10, -1), (10, 0)])
    spans = cut(tensors, file_size)
    assert [span.layer for span in spans] == [-1, -1, 0]
    assert spans[1].offset == tensors[0][0].offset


def test_layers_out_of_order_can_not_be_cut() -> None:
    with pytest.raises(ValueError, match="after layer 1"):
        cut(*layered([(10, 1), (10, 0)]))


@pytest.mark.parametrize("chunk_bytes", [0, 2**20 + 1])
def test_a_chunk_size_out_of_its_range_is_refused(chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        cut([], 64, chunk_bytes)


def test_each_chunk_has_the_digest_of_its_bytes(make_file: Callable[[list[TensorSpec]], Path]) -> None:
    specs = [TensorSpec("a", "F32", (40,)), TensorSpec("b", "F32", (40,))]
    path, layout = make_file(specs), lay_out(specs, {"format": "test"})
    spans = cut(list(zip(layout.entries, [0, 1], strict=True)), layout.file_size, 100)
    data = path.read_bytes()
    for chunk in hash_spans(path, spans):
        assert chunk.sha256 == digest_bytes(data[chunk.offset : chunk.offset + chunk.size])


def test_a_file_that_is_too_short_can_not_be_hashed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    tensors, file_size = layered([(10, 0)])
    with pytest.raises(EOFError):
        hash_spans(tmp_path / "f", cut(tensors, file_size))
