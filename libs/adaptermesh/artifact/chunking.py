"""Chunks: pieces of the tensor file that are fetched and verified one by one."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.manifest_parts import HEADER_LAYER, MAX_CHUNK_BYTES, Chunk, TensorEntry

DEFAULT_CHUNK_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [offset, offset + size) of the tensor file, all of one layer."""

    offset: int
    size: int
    layer: int


def cut(
    tensors: Sequence[tuple[TensorEntry, int]], file_size: int, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> tuple[Span, ...]:
    """Cuts a file into spans without gaps, none larger than `chunk_bytes`, none across the end of a layer.

    `tensors` are the entries in the order of the file, each with its layer; padding goes with what is before.

    Raises:
        ValueError: the layers are not in order, or `chunk_bytes` is not in [1, 1 MiB].
    """
    if not 1 <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"{chunk_bytes} is not in [1, {MAX_CHUNK_BYTES}]")
    return tuple(
        Span(offset, min(chunk_bytes, end - offset), layer)
        for start, end, layer in _regions(tensors, file_size)
        for offset in range(start, end, chunk_bytes)
    )


def _regions(tensors: Sequence[tuple[TensorEntry, int]], file_size: int) -> Iterator[tuple[int, int, int]]:
    """The header, then each layer, as (start, end, layer)."""
    start, current = 0, HEADER_LAYER
    # The header is a region of its own, also before tensors that share its layer.
    starts = [(tensors[0][0].offset, tensors[0][1], True)] if tensors else []
    starts += [(entry.offset, layer, False) for entry, layer in tensors[1:]]
    for offset, layer, first in starts:
        if layer < current:
            raise ValueError(f"layer {layer} comes after layer {current}")
        if first or layer != current:
            yield start, offset, current
            start, current = offset, layer
    yield start, file_size, current


def hash_spans(path: Path, spans: Sequence[Span]) -> tuple[Chunk, ...]:
    """Reads the file once and gives each span its digest."""
    chunks: list[Chunk] = []
    with path.open("rb") as file:
        for span in spans:
            file.seek(span.offset)
            data = file.read(span.size)
            if len(data) != span.size:
                raise EOFError(f"the file ends inside of the chunk at {span.offset}")
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            chunks.append(Chunk(span.offset, span.size, digest, span.layer))
    return tuple(chunks)
