import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from adaptermesh.core.errors import Code, MeshError
from adaptermesh.worker.models.cache import ModelCache
from adaptermesh.worker.models.pull import PullRequest, pull

Answer = Callable[..., None]


def ignore(_: str) -> None:
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[dict[str, Any]]]:
    """Answers for the hub; returns the list of what it was asked."""

    def install(answer: Answer) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def snapshot_download(repository: str, **options: Any) -> None:
            asked.append({"repository": repository, **options})
            answer(options["local_dir"])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return install


def raising(error: Exception) -> Answer:
    def answer(_: Path) -> None:
        raise error

    return answer


def test_a_hub_model_is_fetched_without_pickles(
    cache: ModelCache, model_folder: Path, hub: Callable[[Answer], list[dict[str, Any]]]
) -> None:
    asked = hub(lambda folder: shutil.copytree(model_folder, folder, dirs_exist_ok=True))
    result = pull(PullRequest("Org/Tiny", revision="abc"), cache, ignore)
    assert result.model.facts.model_id == "org--tiny"
    assert (asked[0]["repository"], asked[0]["revision"]) == ("Org/Tiny", "abc")
    assert not [pattern for pattern in asked[0]["allow_patterns"] if pattern.endswith((".bin", ".py", ".pt"))]


def test_a_model_that_the_hub_does_not_show_us_is_not_found(
    cache: ModelCache, hub: Callable[[Answer], list[dict[str, Any]]]
) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    hub(raising(RepositoryNotFoundError("404", response=response)))
    with pytest.raises(MeshError, match="private or gated") as caught:
        pull(PullRequest("Org/Tiny"), cache, ignore)
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no connection\nlong text"), ConnectionError("refused"), OSError("reset")],
)
def test_a_hub_that_does_not_answer_is_one_clear_error(
    cache: ModelCache, hub: Callable[[Answer], list[dict[str, Any]]], home: Path, error: Exception
) -> None:
    hub(raising(error))
    with pytest.raises(MeshError, match="could not be fetched from the Hugging Face hub") as caught:
        pull(PullRequest("Org/Tiny"), cache, ignore)
    assert caught.value.code is Code.UNAVAILABLE
    assert "\n" not in caught.value.message
    assert [path.name for path in (home / "models").iterdir()] == [".org--tiny.lock"]
