"""The safetensors container: a strict reader of headers and a writer with aligned tensors.

Layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes back to back.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.artifact.manifest_parts import TENSOR_ALIGNMENT, TensorEntry
from adaptermesh.artifact.problems import Rejection, shown
from adaptermesh.artifact.strict_json import parse_object

MAX_HEADER_BYTES = 8 * 2**20
"""Room for some 60,000 tensors."""
MAX_HEADER_PARTS = 2**19
"""Likewise: a matrix is eight."""
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8
_MAX_NESTING = 3
_MAX_SIZE = 2**48

DTYPES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Known dtypes and their size in bytes."""

_PAD = "pad."


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was checked: the tensors by name in the order of the file, and the free metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file; the tensors' bytes are not touched.

    Raises:
        Rejection: with what is wrong.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = _header_length(prefix, size)
        text = file.read(length)
    if len(text) != length:
        raise _bad(f"it ends inside of its header of {length} bytes")
    return parse_header(text, size)


def parse_header(text: bytes, file_size: int) -> Header:
    """Checks a header's JSON against the size of its file.

    Raises:
        Rejection: with what is wrong.
    """
    data_start = 8 + len(text)
    if text[:1] != b"{":
        raise _bad("its header does not begin with '{'")
    try:
        content = parse_object(text, _MAX_NESTING, MAX_HEADER_PARTS)
    except ValueError as error:
        raise _bad(f"its header is no valid JSON: {str(error)[:200]}") from None
    metadata = _metadata(content.pop("__metadata__", {}))
    entries = [_entry(name, value, data_start) for name, value in content.items()]
    entries.sort(key=lambda entry: entry.offset)
    end = data_start
    for entry in entries:
        if entry.offset != end:
            how = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise _bad(f"tensor {shown(entry.name)} begins at {entry.offset}, expected {end}: it {how}")
        end = entry.offset + entry.size
    if end != file_size:
        what = "truncated" if end > file_size else "followed by bytes that no tensor owns"
        raise _bad(f"its tensors end at byte {end}, the file has {file_size}: it is {what}")
    return Header({entry.name: entry for entry in entries}, metadata, data_start, file_size)


def _header_length(prefix: bytes, file_size: int) -> int:
    if len(prefix) < 8:
        raise _bad(f"it has {file_size} bytes, a header needs at least 8")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _bad(f"its header claims {length} bytes, not 2 to {MAX_HEADER_BYTES}")
    if 8 + length > file_size:
        raise _bad(f"its header claims {length} bytes, the file has {file_size}: it is truncated")
    return length


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _bad("its __metadata__ is not a map of strings")
    return value


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    what = f"tensor {shown(name)}"
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise _bad(f"{what} needs a printable name of 1 to {MAX_NAME_LENGTH} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"{what} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(f"{what} has the unknown dtype {shown(str(dtype), 40)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise _bad(f"{what} has no valid shape")
    if 0 in shape:
        raise _bad(f"{what} has shape {shape}: a zero-length tensor holds nothing")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _bad(f"{what} has no valid data_offsets")
    begin, end = offsets
    size = math.prod(shape) * DTYPES[dtype]
    if end - begin != size:
        raise _bad(f"{what} has {end - begin} bytes, {dtype} of shape {shape} needs {size}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, size)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _bad(message: str) -> Rejection:
    return Rejection([f"safetensors: {message}"])


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a file goes. `head` is length and header; `entries` leaves the padding out."""

    head: bytes
    entries: tuple[TensorEntry, ...]
    file_size: int


def lay_out(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], *, alignment: int = TENSOR_ALIGNMENT
) -> Layout:
    """Lays tensors out in the order given, each at a multiple of 64 bytes or of another power of 2.

    The format allows no holes, so the bytes between two tensors belong to a `pad.<n>` tensor of type U8;
    there is none where every size is a multiple of `alignment`. The header is padded with spaces, which the
    format allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: list[tuple[TensorSpec, int]] = []
    end = 0
    for spec in specs:
        pad = -end % alignment
        if pad:
            header[f"{_PAD}{len(relative)}"] = _describe("U8", (pad,), end, end + pad)
            end += pad
        if spec.name in header or spec.name.startswith(_PAD):
            raise ValueError(f"tensor name {spec.name!r} is taken")
        header[spec.name] = _describe(spec.dtype, spec.shape, end, end + spec.size)
        relative.append((spec, end))
        end += spec.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % TENSOR_ALIGNMENT)
    start = 8 + len(text)
    entries = tuple(TensorEntry(s.name, s.dtype, s.shape, start + at, s.size) for s, at in relative)
    return Layout(len(text).to_bytes(8, "little") + text, entries, start + end)


def _describe(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_file(path: Path, layout: Layout, contents: Iterable[Iterable[bytes]]) -> None:
    """Writes a file: for each entry of the layout, in order, the pieces of its bytes.

    Raises:
        ValueError: a tensor's pieces have another size than its entry.
    """
    with path.open("wb") as file:
        file.write(layout.head)
        for entry, pieces in zip(layout.entries, contents, strict=True):
            file.write(b"\0" * (entry.offset - file.tell()))
            written = sum(file.write(piece) for piece in pieces)
            if written != entry.size:
                raise ValueError(f"tensor {entry.name!r} has {written} bytes, its shape needs {entry.size}")
