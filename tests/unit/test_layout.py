"""The layout that everything else relies on."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    path
    for root in ("libs/adaptermesh", "services/adaptermesh")
    for path in (ROOT / root).iterdir()
    if path.is_dir() and path.name != "__pycache__"
)


@pytest.mark.parametrize("root", ["libs/adaptermesh", "services/adaptermesh"])
def test_a_namespace_root_has_no_init_file(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists(), "it would hide the other root"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_typed(package: Path) -> None:
    assert (package / "py.typed").exists()
    assert (package / "__init__.py").exists()


def test_every_generated_folder_is_a_package() -> None:
    for folder in (ROOT / "libs/adaptermesh/api").rglob("*"):
        if folder.is_dir() and folder.name != "__pycache__":
            assert (folder / "__init__.py").exists(), folder
