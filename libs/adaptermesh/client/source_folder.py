"""The folder that a training run leaves: which of its files are uploaded, and their digests."""

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.client.records import SourceFile
from adaptermesh.core.errors import Code, MeshError, Reason

MAX_FILES = 64
MAX_TEXT_BYTES = 2**20
_TEXT_SUFFIXES = frozenset({".json", ".jsonl", ".jinja", ".md", ".model", ".txt", ".yaml", ".yml"})
_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_TRAINING_STATE = frozenset(
    {"optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state.pth"}
)
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FolderFile:
    """One file to upload: where it is, and how the store will know it."""

    location: Path
    source: SourceFile


async def read_folder(folder: Path) -> tuple[FolderFile, ...]:
    """Lists and hashes the files of a peft folder that belong to the adapter, in order of their paths.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD): no adapter here, or its weights are a pickle.
    """
    locations = await asyncio.to_thread(_locations, folder)
    return tuple(
        await asyncio.gather(*(asyncio.to_thread(_describe, folder, location) for location in locations))
    )


def digest_file(location: Path) -> str:
    """The digest of a file's bytes. Blocks."""
    digest = hashlib.sha256()
    with location.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _describe(folder: Path, location: Path) -> FolderFile:
    path = location.relative_to(folder).as_posix()
    return FolderFile(location, SourceFile(path, location.stat().st_size, digest_file(location)))


def _locations(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise _invalid(
            f"'{folder}' is not a folder; give the folder that peft's save_pretrained wrote", folder
        )
    present = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    pickles = [path.name for path in present if _is_pickle(path)]
    if pickles:
        raise _invalid(
            f"'{folder}' holds pickled weights ({', '.join(pickles)}), which can run code when read; "
            "save them again with save_pretrained(..., safe_serialization=True), or remove them",
            folder,
        )
    files = [path for path in present if _belongs(path)]
    if not any(path.suffix == ".safetensors" for path in files):
        raise _invalid(f"'{folder}' holds no .safetensors file: there are no adapter weights in it", folder)
    if not any(path.name == "adapter_config.json" for path in files):
        raise _invalid(f"'{folder}' holds no adapter_config.json: it is not an adapter's folder", folder)
    if len(files) > MAX_FILES:
        raise _invalid(f"'{folder}' holds {len(files)} files, more than {MAX_FILES}", folder)
    return files


def _is_pickle(path: Path) -> bool:
    """What a training run leaves beside the weights is left out, not refused."""
    return path.suffix.lower() in _PICKLE_SUFFIXES and path.name not in _TRAINING_STATE


def _belongs(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.suffix == ".safetensors":
        return True
    is_text = path.suffix.lower() in _TEXT_SUFFIXES or path.name.upper() in {"LICENSE", "NOTICE"}
    return is_text and path.stat().st_size <= MAX_TEXT_BYTES


def _invalid(message: str, folder: Path) -> MeshError:
    return MeshError(Code.INVALID_ARGUMENT, Reason.INVALID_UPLOAD, message, metadata={"folder": str(folder)})
