"""The folder that a training run leaves: which of its files are uploaded, and their digests."""

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.artifact.source_files import CONFIG_FILE, SETUP, layout_of
from adaptermesh.client.pickled_weights import CONVERTED, convert
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


async def read_folder(folder: Path, room: Path | None = None) -> tuple[FolderFile, ...]:
    """Lists and hashes the files of a folder that belong to the adapter, in order of their paths.

    The folder is one that peft or the adapters library saved. Pickles of the latter are converted into
    `room`, which has to outlive the upload; without it they are refused.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_UPLOAD): no adapter here, or its weights are a pickle.
    """
    locations = await asyncio.to_thread(_locations, folder, room)
    return tuple(
        await asyncio.gather(
            *(asyncio.to_thread(_describe, locations[path], path) for path in sorted(locations))
        )
    )


def digest_file(location: Path) -> str:
    """The digest of a file's bytes. Blocks."""
    digest = hashlib.sha256()
    with location.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _describe(location: Path, path: str) -> FolderFile:
    return FolderFile(location, SourceFile(path, location.stat().st_size, digest_file(location)))


def _locations(folder: Path, room: Path | None) -> dict[str, Path]:
    """Where each file of the upload is, by its path in the folder."""
    if not folder.is_dir():
        raise _invalid(
            f"'{folder}' is not a folder; give the folder that peft's save_pretrained or the adapters "
            "library's save_adapter wrote",
            folder,
        )
    present = {path.relative_to(folder).as_posix(): path for path in _present(folder)}
    pickles = {name: path for name, path in present.items() if _is_pickle(path)}
    strange = [name for name, path in pickles.items() if room is None or path.name not in CONVERTED]
    if strange:
        raise _invalid(
            f"'{folder}' holds pickled weights ({', '.join(strange)}), which can run code when read; "
            "save them again with save_pretrained(..., safe_serialization=True), or remove them",
            folder,
        )
    files = {name: path for name, path in present.items() if _belongs(path)}
    if room is not None:
        files |= _converted(folder, pickles, files, room)
    if not any(name.endswith(".safetensors") for name in files):
        raise _invalid(f"'{folder}' holds no .safetensors file: there are no adapter weights in it", folder)
    if layout_of(files).config not in files:
        raise _invalid(f"'{folder}' holds no {CONFIG_FILE}: it is not an adapter's folder", folder)
    if len(files) > MAX_FILES:
        raise _invalid(f"'{folder}' holds {len(files)} files, more than {MAX_FILES}", folder)
    return files


def _present(folder: Path) -> list[Path]:
    """The files in the folder itself; of a set-up also those in the folders of its members."""
    inside = sorted(path for path in folder.iterdir() if not path.is_symlink())
    files = [path for path in inside if path.is_file()]
    if any(path.name == SETUP.config for path in files):
        members = [path for path in inside if path.is_dir() and not path.name.startswith(".")]
        files += [path for member in members for path in sorted(member.iterdir()) if _is_plain_file(path)]
    return files


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _converted(folder: Path, pickles: dict[str, Path], files: dict[str, Path], room: Path) -> dict[str, Path]:
    """Writes every pickle into `room` as safetensors; the new files by their paths in the upload."""
    found: dict[str, Path] = {}
    for name, pickled in pickles.items():
        path = name.removesuffix(pickled.name) + CONVERTED[pickled.name]
        if path in files:
            raise _invalid(
                f"'{folder}' holds both {name} and {path}: remove the one that is out of date", folder
            )
        found[path] = room / f"{len(found)}.safetensors"
        convert(pickled, found[path])
    return found


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
