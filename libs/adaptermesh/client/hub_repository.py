"""An adapter in a repository of the Hugging Face hub: only its own files are fetched, and no pickle ever."""

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptermesh.artifact.source_files import ADAPTERS, CARD_FILE, FUSION, HEAD_CONFIG_FILE, PEFT, SETUP
from adaptermesh.core.errors import Code, MeshError, Reason, not_found, unavailable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

SCHEME = "hf://"
MAX_BYTES = 512 * 2**20
_SECONDS = 10.0
_REPOSITORY = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,200}))?", re.ASCII)
_TEXTS = (CARD_FILE, HEAD_CONFIG_FILE, "LICENSE", "NOTICE")
_ALLOWED = frozenset(_TEXTS).union(
    *({layout.config, layout.weights, *layout.beside} for layout in (PEFT, ADAPTERS, FUSION))
)
_CONFIGS = (PEFT.config, FUSION.config)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class HubRepository:
    """`hf://org/name[@revision]`; `endpoint` None is the hub that huggingface_hub is set to."""

    repository: str
    revision: str | None = None
    endpoint: str | None = None

    @classmethod
    def parse(cls, text: str, endpoint: str | None = None) -> "HubRepository":
        """Raises MeshError INVALID_FIELD for anything else."""
        match = _REPOSITORY.fullmatch(text.removeprefix(SCHEME))
        if match is None or not text.startswith(SCHEME):
            raise MeshError(
                Code.INVALID_ARGUMENT,
                Reason.INVALID_FIELD,
                f"{text[:200]!r} is no repository of the Hugging Face hub: write hf://org/name or "
                "hf://org/name@revision",
                metadata={"field": "path"},
            )
        return cls(match[1], match[2], endpoint)

    def __str__(self) -> str:
        return SCHEME + self.repository + (f"@{self.revision}" if self.revision else "")

    async def fetch(self, folder: Path) -> str:
        """Brings the adapter's files of one commit into `folder`; returns the commit.

        Raises:
            MeshError: NOT_FOUND: no such repository or revision, or not for us. UNAVAILABLE: no answer.
                INVALID_ARGUMENT (INVALID_UPLOAD): there is no adapter in it, or it is too large.
        """
        return await asyncio.to_thread(self._fetch, folder)

    def _fetch(self, folder: Path) -> str:
        # Only here: nothing else needs it.
        try:
            from huggingface_hub import HfApi, hf_hub_download
            from huggingface_hub.errors import (
                HfHubHTTPError,
                LocalEntryNotFoundError,
                RepositoryNotFoundError,
                RevisionNotFoundError,
            )
            from huggingface_hub.utils.tqdm import disable_progress_bars
        except ImportError as error:
            raise MeshError(
                Code.FAILED_PRECONDITION,
                Reason.INVALID_FIELD,
                "reading from the Hugging Face hub needs huggingface_hub: pip install huggingface_hub",
                metadata={"field": "path"},
            ) from error
        disable_progress_bars()
        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                self.repository, revision=self.revision, files_metadata=True, timeout=_SECONDS
            )
            for name, size in self._chosen(info).items():
                place = hf_hub_download(
                    self.repository,
                    name,
                    revision=info.sha,
                    local_dir=folder,
                    endpoint=self.endpoint,
                    etag_timeout=_SECONDS,
                )
                if Path(place).stat().st_size != size:
                    raise self._refused(
                        f"{name} arrived with another size than the {size} bytes it is said to have"
                    )
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            what = "the Hugging Face hub has it not for us (misspelt, private or gated: see `hf auth login`):"
            raise not_found(Reason.FILE_NOT_FOUND, f"{what} repository", str(self)) from error
        except (_transport(HfHubHTTPError), LocalEntryNotFoundError, OSError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"'{self}' could not be fetched from the Hugging Face hub: {first[:300]}"
            raise unavailable(Reason.STORE_UNREACHABLE, message, retry_after=30.0, name=str(self)) from error
        return info.sha or ""

    def _chosen(self, info: "ModelInfo") -> dict[str, int]:
        """The adapter's files by name, with their sizes."""
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        chosen = {name: size for name, size in sorted(sizes.items()) if name in _ALLOWED}
        self._check(sizes, chosen)
        known = {name: size for name, size in chosen.items() if size is not None}
        if len(known) < len(chosen):
            raise self._refused("the hub does not say how large its files are")
        if sum(known.values()) > MAX_BYTES:
            raise self._refused(f"its files have {sum(known.values())} bytes, more than {MAX_BYTES}")
        return known

    def _check(self, present: Iterable[str], chosen: Iterable[str]) -> None:
        if SETUP.config in present:
            raise self._refused("it is a set-up of several adapters: fetch it by hand and upload the folder")
        if not any(name in chosen for name in _CONFIGS):
            raise self._refused(f"it holds no {PEFT.config}: there is no adapter at its top")
        if any(name.endswith(".safetensors") for name in chosen):
            return
        if any(name.endswith(_PICKLES) for name in present):
            raise self._refused(
                "its weights are a pickle, which can run code when read: only safetensors are taken"
            )
        raise self._refused("it holds no adapter weights")

    def _refused(self, why: str) -> MeshError:
        return MeshError(
            Code.INVALID_ARGUMENT,
            Reason.INVALID_UPLOAD,
            f"'{self}' can't be imported: {why}",
            metadata={"name": str(self)},
        )


def _transport(error: type[Exception]) -> type[Exception]:
    """What all errors of the HTTP client are: the hub's own is one, and which client it is differs."""
    return next((base for base in error.__mro__ if base.__name__ == "HTTPError"), error)
