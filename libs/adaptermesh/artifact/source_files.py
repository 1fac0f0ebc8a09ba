"""The files of an upload: their names, what may be among them, their digests."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptermesh.artifact.manifest_parts import SourceFile
from adaptermesh.artifact.problems import Problems, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
HEAD_CONFIG_FILE = "head_config.json"
HEAD_FILE = "model_head.safetensors"

MAX_FILES = 64
MAX_PATH_LENGTH = 255
MAX_TEXT_BYTES = 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})
_TEXT_SUFFIXES = frozenset({".md", ".txt", ".json", ".jsonl", ".jinja", ".yaml", ".yml"})
_TEXT_NAMES = frozenset({"LICENSE", "NOTICE", "LICENCE", ".gitattributes"})
_TOKENIZER_NAMES = frozenset({"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"})
# How a pickle (protocol 2 and up) and a zip archive, which torch.save writes, begin.
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")


# What the adapters library writes unless it is told to use safetensors.
_ADAPTERS_PICKLES = frozenset(
    {"pytorch_adapter.bin", "pytorch_model_head.bin", "pytorch_model_adapter_fusion.bin"}
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a library saves: its config, its tensors, and further files of tensors that may be beside them.

    `weights` is empty where the tensors are in a folder for each member; then any of the files may be in one.
    """

    library: str
    config: str
    weights: str
    beside: frozenset[str]
    written_by: str

    def has_tensors(self, path: str) -> bool:
        """Whether a file of that name holds tensors of this layout."""
        if self.weights:
            return path == self.weights or path in self.beside
        return PurePosixPath(path).name in self.beside


PEFT = Layout("peft", CONFIG_FILE, WEIGHTS_FILE, frozenset(), "peft's save_pretrained")
ADAPTERS = Layout(
    "adapters",
    CONFIG_FILE,
    "adapter.safetensors",
    frozenset({HEAD_FILE}),
    "save_adapter(..., use_safetensors=True)",
)
FUSION = Layout(
    "adapters",
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    frozenset({HEAD_FILE}),
    "save_adapter_fusion(..., use_safetensors=True)",
)
SETUP = Layout(
    "adapters",
    "adapter_setup.json",
    "",
    frozenset({"adapter.safetensors", HEAD_FILE, "model_adapter_fusion.safetensors"}),
    "save_adapter_setup(..., use_safetensors=True)",
)


def layout_of(files: Mapping[str, Path]) -> Layout:
    """How the upload was saved, told by the names of its files; peft's way if nothing else is there."""
    for layout in (SETUP, FUSION):
        if layout.config in files:
            return layout
    return ADAPTERS if ADAPTERS.weights in files else PEFT


def check_path(path: str) -> str | None:
    """What is wrong with a file's name; None if it is a safe relative path with forward slashes."""
    if not 0 < len(path) <= MAX_PATH_LENGTH or not path.isprintable():
        return f"file name {shown(path)} needs 1 to {MAX_PATH_LENGTH} printable characters"
    if "\\" in path or ":" in path:
        return f"file name {shown(path)}: use forward slashes, no backslash and no colon"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return f"file name {shown(path)} must be relative to the adapter's folder, without '..'"
    return None


def check_files(files: Mapping[str, Path], problems: Problems) -> None:
    """Notes every file that may not be in an upload, and those that must be."""
    if len(files) > MAX_FILES:
        problems.add(f"{len(files)} files are more than {MAX_FILES}")
        return
    layout = layout_of(files)
    folded: dict[str, str] = {}
    for path, place in files.items():
        wrong = check_path(path) or _check_kind(path, place, layout)
        if wrong is not None:
            problems.add(wrong)
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            problems.add(f"files {shown(other)} and {shown(path)} differ only in case")
    for needed in (layout.config, layout.weights):
        if needed and needed not in files:
            problems.add(f"{needed} is missing; upload the folder that {layout.written_by} wrote")


def _check_kind(path: str, place: Path, layout: Layout) -> str | None:
    if layout.has_tensors(path):
        return None
    name = PurePosixPath(path)
    if name.name in _ADAPTERS_PICKLES:
        return (
            f"file {shown(path)} is a pickle, which can run code when it is opened: save it again with "
            "use_safetensors=True, or upload the folder with adaptermesh's own client, which converts it"
        )
    if name.suffix.lower() in _PICKLE_SUFFIXES:
        return (
            f"file {shown(path)} may hold a pickle, which can run code when it is opened: leave it out, and "
            "save weights with save_pretrained(..., safe_serialization=True)"
        )
    if name.suffix.lower() == ".safetensors":
        weights = layout.weights or "file for each member"
        return f"file {shown(path)}: one {weights} must hold all tensors, save without shards"
    if name.suffix.lower() not in _TEXT_SUFFIXES and name.name not in _TEXT_NAMES:
        return f"file {shown(path)} is neither part of an adapter nor a text about it: leave it out"
    return _check_text(path, place, MAX_TOKENIZER_BYTES if name.name in _TOKENIZER_NAMES else MAX_TEXT_BYTES)


def _check_text(path: str, place: Path, limit: int) -> str | None:
    size = place.stat().st_size
    if size > limit:
        return f"file {shown(path)} has {size} bytes, a text of its kind may have {limit}"
    data = place.read_bytes()
    if data.startswith(_PICKLE_STARTS):
        return f"file {shown(path)} is a pickle or an archive under the name of a text: leave it out"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return f"file {shown(path)} is not UTF-8 text"
    return None


def describe_files(files: Mapping[str, Path]) -> tuple[SourceFile, ...]:
    """Path, size and digest of each file, ordered by path."""
    return tuple(_describe(path, files[path]) for path in sorted(files))


def _describe(path: str, place: Path) -> SourceFile:
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SourceFile(path, file.tell(), f"sha256:{digest}")


def card_text(files: Mapping[str, Path]) -> str:
    """The card, README.md; empty if there is none."""
    return files[CARD_FILE].read_text(encoding="utf-8") if CARD_FILE in files else ""
