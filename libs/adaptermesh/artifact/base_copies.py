"""Copies of the base's own weights in an upload: kept as digests, and compared with the base where it is.

peft saves the embeddings beside an adapter that touches them, and the `adapters` library a model's head
beside every adapter. They are as large as the base's and, nearly always, the same.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest_parts import TensorEntry
from adaptermesh.artifact.plan import Floats

_BLOCK_ROWS = 4096


def rounded_digest(rows: Iterable[Floats]) -> str:
    """The digest of float32 values rounded to bfloat16: the same for a base and a copy in either.

    rows: pieces of [n, hidden], one after the other.
    """
    found = hashlib.sha256()
    for piece in rows:
        bits = np.ascontiguousarray(piece, "<f4").view("<u4")
        # To the nearest, ties to even.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        found.update(rounded.astype("<u2").tobytes())
    return f"sha256:{found.hexdigest()}"


def digest_copies(copies: Mapping[str, tuple[str, TensorEntry]], files: Mapping[str, Path]) -> dict[str, str]:
    """The `same_as_base` of a manifest. copies: the file of each copy and its entry there, by the site."""
    return {site: _digest(files[name], entry) for site, (name, entry) in copies.items()}


def _digest(path: Path, entry: TensorEntry) -> str:
    rows, width = entry.shape
    row_bytes = entry.size // rows
    with path.open("rb") as file:
        return rounded_digest(
            tensor_from_file(
                TensorEntry(
                    entry.name,
                    entry.dtype,
                    (count, width),
                    entry.offset + start * row_bytes,
                    count * row_bytes,
                ),
                file,
            )
            for start in range(0, rows, _BLOCK_ROWS)
            for count in (min(_BLOCK_ROWS, rows - start),)
        )
