"""The weights of a model folder: which files hold them, are they whole, and their digest."""

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.core.digests import digest_json
from adaptermesh.core.errors import Code, MeshError, Reason

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes from the start of the file
    end: int


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): there are none, or one that the index names is missing.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        names = {SINGLE_FILE}
    else:
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _corrupt(index, "not an index of safetensors files") from error
    files = tuple(folder / name for name in sorted(names) if Path(name).name == name)
    missing = len(names) - len(files) + sum(not file.is_file() for file in files)
    if missing:
        raise _corrupt(folder, f"{missing} of {len(names)} safetensors files are missing")
    return files


def check_whole(folder: Path) -> int:
    """Checks in a moment that no weight file is truncated; returns their bytes.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT).
    """
    files = weight_files(folder)
    for file in files:
        _tensors(file)
    return sum(file.stat().st_size for file in files)


def weights_digest(folder: Path) -> str:
    """The digest of all tensors by (name, dtype, shape, bytes), whatever files they are in.

    It is the digest of the JSON list `[[name, dtype, shape, sha256 of the bytes], ...]` sorted by name.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): a file is truncated, or a tensor is there twice.
    """
    entries: dict[str, list[Any]] = {}
    for file in weight_files(folder):
        tensors = _tensors(file)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                for tensor in tensors:
                    if tensor.name in entries:
                        raise _corrupt(file, f"tensor {tensor.name!r} is in two files")
                    content = hashlib.sha256(view[tensor.start : tensor.end]).hexdigest()
                    entries[tensor.name] = [tensor.name, tensor.dtype, list(tensor.shape), content]
            finally:
                view.release()
    return digest_json([entries[name] for name in sorted(entries)])


def _tensors(file: Path) -> list[_Tensor]:
    """The tensors of one safetensors file, after checking that its length is what its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _corrupt(file, "not a safetensors file, or truncated in its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = [
            _Tensor(
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                file,
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _corrupt(file, "its safetensors header can't be read") from error
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if expected != size or any(not 8 + length <= t.start <= t.end for t in tensors):
        raise _corrupt(file, f"{size} bytes instead of {expected}: truncated or damaged")
    return tensors


def _corrupt(path: Path, why: str) -> MeshError:
    return MeshError(Code.DATA_LOSS, Reason.DATA_CORRUPT, f"{path}: {why}", metadata={"file": path.name})
