"""The model cache on disk: `<home>/models/<model_id>/`, each folder complete or not there."""

import contextlib
import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, not_found
from adaptermesh.worker.models.names import check_model_id, model_id_of
from adaptermesh.worker.models.weights import check_whole, weights_digest

FACTS_FILE = "base_model.json"
_LOCK_SECONDS = 3600.0
_LOCK_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the cache."""

    folder: Path
    facts: BaseFacts
    size_bytes: int  # of the weights

    def to_json(self) -> dict[str, Any]:
        return {
            "model_id": self.facts.model_id,
            "path": str(self.folder),
            "digest": self.facts.digest,
            "config_digest": self.facts.config_digest,
            "weights_digest": self.facts.weights_digest,
            "architecture": self.facts.architecture,
            "size_bytes": self.size_bytes,
        }


class ModelCache:
    """The models below one home folder."""

    def __init__(self, home: Path, clock: Clock) -> None:
        self._root = home / "models"
        self._clock = clock

    def find(self, model_id: str) -> CachedModel | None:
        """The model, if it is there; looks at its facts and file lengths, not at every byte.

        Raises:
            MeshError: INVALID_ARGUMENT for an illegal id, DATA_LOSS (DATA_CORRUPT) for a damaged folder.
        """
        folder = self._root / check_model_id(model_id)
        if not folder.is_dir():
            return None
        return CachedModel(folder, read_facts(folder), check_whole(folder))

    def ls(self) -> tuple[CachedModel, ...]:
        """All models by id; damaged folders raise as in `find`."""
        if not self._root.is_dir():
            return ()
        ids = sorted(
            path.name for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        return tuple(model for model_id in ids if (model := self.find(model_id)) is not None)

    def locate(self, name: str) -> CachedModel:
        """The model that a setting names: an id, a hub name that was pulled, or a folder made by a pull.

        Raises:
            MeshError: NOT_FOUND (BASE_NOT_FOUND) with the command that would bring it here.
        """
        folder = Path(name).expanduser()
        if name and (folder / FACTS_FILE).is_file():
            return CachedModel(folder, read_facts(folder), check_whole(folder))
        # A name that can't be an id is not in the cache; a damaged folder is, and says so itself.
        model_id = ""
        with contextlib.suppress(MeshError):
            model_id = model_id_of(name)
        if model_id and (model := self.find(model_id)) is not None:
            return model
        raise MeshError(
            Code.NOT_FOUND,
            Reason.BASE_NOT_FOUND,
            f"base model '{name}' is not in the cache; bring it here with `adaptermesh models pull {name}`",
            metadata={"name": name},
        )

    def locate_config(self, name: str) -> Path:
        """The folder that a setting names, of which only config.json is asked: an id, or any folder.

        Raises:
            MeshError: NOT_FOUND (BASE_NOT_FOUND); INVALID_ARGUMENT (INVALID_NAME) if no model id can be made
                of the folder's name.
        """
        for folder in (Path(name).expanduser().resolve(), self._root / name):
            if name and (folder / "config.json").is_file():
                check_model_id(folder.name)
                return folder
        raise MeshError(
            Code.NOT_FOUND,
            Reason.BASE_NOT_FOUND,
            f"base model '{name}' has no folder with a config.json",
            metadata={"name": name},
        )

    def publish(
        self, model_id: str, fill: Callable[[Path], None], note: Callable[[str], None] = lambda _: None
    ) -> CachedModel:
        """Fills a folder beside its place, derives its facts, then puts it in place in one step.

        A model that is already there is returned as it is. Two pulls of one model wait for each other.
        """
        check_model_id(model_id)
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock(model_id, note):
            if (present := self.find(model_id)) is not None:
                return present
            work = Path(tempfile.mkdtemp(prefix=f".{model_id}-", dir=self._root))
            try:
                work.chmod(0o755)
                fill(work)
                note("computing the digest of the weights")
                write_facts(work, model_id)
                work.rename(self._root / model_id)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        published = self.find(model_id)
        if published is None:
            raise not_found(Reason.BASE_NOT_FOUND, "base model", model_id)
        return published

    @contextlib.contextmanager
    def _lock(self, model_id: str, note: Callable[[str], None]) -> Iterator[None]:
        with (self._root / f".{model_id}.lock").open("w") as file:
            give_up = self._clock.monotonic() + _LOCK_SECONDS
            waiting = False
            while not _try_lock(file.fileno()):
                if not waiting:
                    note(f"another pull of {model_id} is under way, waiting for it")
                    waiting = True
                if self._clock.monotonic() > give_up:
                    raise MeshError(
                        Code.UNAVAILABLE,
                        Reason.OVERLOADED,
                        f"another pull of {model_id} doesn't end",
                        retry_after=60.0,
                    )
                time.sleep(_LOCK_POLL_SECONDS)
            yield


def read_facts(folder: Path) -> BaseFacts:
    """The facts of a model folder, checked against its config.

    Raises:
        MeshError: DATA_LOSS (DATA_CORRUPT): they are missing or don't belong to this config.
    """
    try:
        facts = BaseFacts.from_json(json.loads((folder / FACTS_FILE).read_text("utf-8")))
        derived = BaseFacts.from_config(facts.model_id, read_config(folder), facts.weights_digest)
    except (OSError, ValueError, MeshError) as error:
        raise _damaged(folder, str(error)) from error
    if derived.digest != facts.digest:
        raise _damaged(folder, f"config.json gives digest {derived.digest}, {FACTS_FILE} says {facts.digest}")
    return facts


def write_facts(folder: Path, model_id: str) -> BaseFacts:
    """Derives the facts of a model folder from its config and weights and writes them beside these."""
    facts = BaseFacts.from_config(model_id, read_config(folder), weights_digest(folder))
    text = json.dumps(facts.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FACTS_FILE).write_text(text + "\n", "utf-8")
    return facts


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; raises MeshError DATA_LOSS (DATA_CORRUPT)."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"config.json can't be read: {error}") from error
    if not isinstance(config, dict):
        raise _damaged(folder, "config.json is not an object")
    return config


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _damaged(folder: Path, why: str) -> MeshError:
    return MeshError(
        Code.DATA_LOSS,
        Reason.DATA_CORRUPT,
        f"{folder} is no whole model folder ({why}); remove it and pull the model again",
        metadata={"name": folder.name},
    )
