"""What the `adapters` library saved and computed: the files that `make_goldens.py` wrote."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Manifest

ROOT = Path(__file__).parent / "goldens"
BASES = ("llama", "gpt2")
TOLERANCE = 1e-3
"""Between float32 in two versions of transformers; a real mistake moves a logit by 0.02 and more."""


@dataclass(frozen=True, slots=True)
class Goldens:
    """One base: its folder for `from_pretrained`, the prompts, and by method each prompt's last logits.

    The method "base" has no adapter; every other one has a folder and is served.
    """

    base_folder: Path
    prompts: tuple[tuple[int, ...], ...]
    logits: dict[str, list[list[float]]]

    @property
    def facts(self) -> BaseFacts:
        """The base as the mesh would know it."""
        config = json.loads((self.base_folder / "config.json").read_text())
        return BaseFacts.from_config("golden", config, "sha256:" + "0" * 64)

    def folder(self, method: str) -> Path:
        """An adapter as the library saved it."""
        return self.base_folder.parent / method


def load_goldens(base: str) -> Goldens:
    """The goldens on one of `BASES`."""
    file: Any = json.loads((ROOT / base / "logits.json").read_text())
    return Goldens(ROOT / base / "base", tuple(tuple(ids) for ids in file["prompts"]), file["logits"])


def served_methods() -> list[tuple[str, str]]:
    """Every base and method with logits to compare."""
    return [(base, method) for base in BASES for method in load_goldens(base).logits if method != "base"]


def files_in(folder: Path) -> dict[str, Path]:
    """The files of an upload by their path in the folder."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def ingest_folder(folder: Path, facts: BaseFacts, out_file: Path) -> Manifest:
    """What the mesh makes of an adapter's folder; its tensors are written to `out_file`."""
    bundle = SourceBundle(files_in(folder), "acme", "golden", license="MIT")
    return ingest(bundle, facts, out_file).manifest
