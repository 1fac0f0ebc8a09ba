"""One pass over a tensor's bytes that finds values that are not finite, in bounded memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from adaptermesh.artifact.manifest_parts import TensorEntry

_BLOCK_BYTES = 2**20

# (unsigned type of the same width, bits that are all set in every infinity and NaN and in nothing else).
# F8_E4M3 has no infinity and one NaN magnitude.
_NOT_FINITE: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F8_E5M2": (np.dtype("<u1"), 0x7C),
    "F8_E4M3": (np.dtype("<u1"), 0x7F),
}


@dataclass(frozen=True, slots=True)
class TensorScan:
    """What a pass found: the index of the first value that is not finite, and whether all values are zero."""

    not_finite_at: int | None
    all_zero: bool


def read_blocks(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """The bytes [offset, offset + size) of a file in blocks of at most 1 MiB.

    Raises:
        EOFError: the file is shorter.
    """
    file.seek(offset)
    left = size
    while left:
        block = file.read(min(left, _BLOCK_BYTES))
        if not block:
            raise EOFError(f"the file ends {left} bytes before {offset + size}")
        left -= len(block)
        yield block


def scan_tensor(file: BinaryIO, entry: TensorEntry) -> TensorScan:
    """Looks at every value of a tensor through its bits; integer types are always finite."""
    kind = _NOT_FINITE.get(entry.dtype)
    all_zero, seen = True, 0
    for block in read_blocks(file, entry.offset, entry.size):
        if kind is None:
            all_zero = all_zero and not np.frombuffer(block, np.uint8).any()
            continue
        bits_type, mask = kind
        bits = np.frombuffer(block, bits_type)
        bad = (bits & bits_type.type(mask)) == mask
        if bad.any():
            return TensorScan(seen + int(bad.argmax()), all_zero=False)
        # A negative zero is a zero: shift the sign out.
        all_zero = all_zero and not (bits << bits_type.type(1)).any()
        seen += bits.size
    return TensorScan(None, all_zero)
