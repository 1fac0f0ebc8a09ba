from pathlib import Path

import pytest

from adaptermesh.local import LocalMeshConfig, LocalMeshError


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_model_is_found_in_the_cache_of_the_home(tmp_path: Path) -> None:
    model = make_model(tmp_path / "models" / "tiny")
    assert LocalMeshConfig(home=tmp_path, model="tiny").model_folder() == model


def test_a_model_cache_may_be_shared_by_several_homes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "shared" / "tiny")
    config = LocalMeshConfig(home=tmp_path / "home", model="tiny", models=tmp_path / "shared")
    assert config.model_folder() == model


def test_a_folder_is_a_model_too(tmp_path: Path) -> None:
    model = make_model(tmp_path / "elsewhere")
    assert LocalMeshConfig(home=tmp_path / "home", model=str(model)).model_folder() == model


def test_a_missing_model_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(LocalMeshError, match="'tiny' is not in") as caught:
        LocalMeshConfig(home=tmp_path, model="tiny").model_folder()
    assert "adaptermesh models pull tiny" in caught.value.hint
