"""The documentation says what the code does."""

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_setting_is_documented() -> None:
    path = ROOT / "docs" / "generate_settings.py"
    spec = importlib.util.spec_from_file_location("generate_settings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/generate_settings.py"


def test_the_commands_of_the_readme_exist_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets
    assert {"demo", "up", "test"} <= named


def test_the_files_that_the_documentation_names_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "architecture.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_the_architecture_page_names_modules_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:libs|services|protos|deploy|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_torch_is_pinned_the_same_everywhere() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pin = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    assert pin is not None
    for name in ("Makefile", ".ci/compose"):
        assert f"torch=={pin.group(1)}" in (ROOT / name).read_text(encoding="utf-8"), name
    assert "torch>=2.11" in " ".join(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]["worker"]
    )
