"""Reading the canonical form back: verified chunks and array views without copies."""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adaptermesh.artifact.manifest import Chunk, Manifest, TensorEntry
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason

Buffer = bytes | bytearray | memoryview | mmap.mmap

# numpy has no bfloat16: its views hold the raw bits.
_VIEWS: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def verify_chunk(chunk: Chunk, data: bytes | bytearray | memoryview) -> None:
    """Checks the bytes of one chunk against its digest.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT) with the chunk's place and both digests.
    """
    found = digest_bytes(data)
    if len(data) != chunk.size or found != chunk.sha256:
        raise MeshError(
            Code.DATA_LOSS,
            Reason.DATA_CORRUPT,
            f"chunk at {chunk.offset}: {len(data)} bytes with {found}, "
            f"expected {chunk.size} with {chunk.sha256}",
            metadata={"offset": str(chunk.offset), "expected": chunk.sha256, "found": found},
        )


def verify_file(manifest: Manifest, buffer: Buffer) -> None:
    """Checks a whole tensor file against its manifest.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT).
    """
    view = memoryview(buffer)
    try:
        if len(view) != manifest.size_bytes:
            raise MeshError(
                Code.DATA_LOSS,
                Reason.DATA_CORRUPT,
                f"the tensor file has {len(view)} bytes, the manifest says {manifest.size_bytes}",
            )
        for chunk in manifest.chunks:
            with view[chunk.offset : chunk.offset + chunk.size] as piece:
                verify_chunk(chunk, piece)
    finally:
        view.release()


def tensor_view(entry: TensorEntry, buffer: Buffer) -> npt.NDArray[Any]:
    """A tensor as a read-only view into the file's bytes; BF16 as uint16 bits."""
    dtype = _VIEWS[entry.dtype]
    flat = np.frombuffer(buffer, dtype, count=entry.size // dtype.itemsize, offset=entry.offset)
    view = flat.reshape(entry.shape)
    view.flags.writeable = False
    return view


def to_float32(entry: TensorEntry, view: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """A tensor's values as float32, exact for all three dtypes."""
    if entry.dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        return (view.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return view.astype(np.float32)


def tensor_from_file(entry: TensorEntry, file: BinaryIO) -> npt.NDArray[np.float32]:
    """Reads one tensor of a file as float32; `entry.offset` counts from the start of the file.

    Raises:
        EOFError: the file is shorter.
    """
    file.seek(entry.offset)
    data = file.read(entry.size)
    if len(data) != entry.size:
        raise EOFError(f"the file ends within tensor {entry.name!r}")
    values = np.frombuffer(data, _VIEWS[entry.dtype]).reshape(entry.shape)
    return to_float32(entry, values)


def tensors(manifest: Manifest, buffer: Buffer) -> Iterator[tuple[TensorEntry, npt.NDArray[Any]]]:
    """Every tensor in the order of the file."""
    for entry in manifest.tensors:
        yield entry, tensor_view(entry, buffer)


@contextmanager
def open_buffer(path: Path) -> Iterator[memoryview]:
    """Maps a tensor file into memory; views into it must not outlive the context."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            yield view
        finally:
            view.release()
