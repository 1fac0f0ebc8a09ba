"""Model folders: which of their files count, and how they get into the cache."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.models.cache import read_config
from adaptermesh.worker.models.weights import weight_files

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
"""Everything but the weights that a model folder may bring. No pickle and no Python file is among them."""


def check_model_folder(folder: Path) -> None:
    """Raises MeshError unless the folder has a config, safetensors and a tokenizer, and needs no code."""
    config = read_config(folder)
    if "auto_map" in config:
        raise _refused(folder, "its config.json asks for Python code of its own (auto_map)")
    weight_files(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise _refused(folder, "it has no tokenizer")
    if "auto_map" in _tokenizer_config(folder):
        raise _refused(folder, "its tokenizer_config.json asks for Python code of its own (auto_map)")


def fill_from_folder(source: Path, folder: Path) -> None:
    """Brings a local model folder into the cache: weights as hard links where the disk allows it.

    Raises:
        MeshError: see `check_model_folder`.
    """
    check_model_folder(source)
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for file in weight_files(source):
        link_or_copy(file.resolve(), folder / file.name)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the two are on different disks."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise _refused(folder, f"its {file.name} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _refused(folder: Path, why: str) -> MeshError:
    return MeshError(
        Code.INVALID_ARGUMENT,
        Reason.INVALID_UPLOAD,
        f"{folder.name} is not taken as a base model: {why}",
        metadata={"name": folder.name},
    )
