from pathlib import Path

import pytest

from adaptermesh.worker.models.settings import ModelSettings


def test_the_cache_is_below_the_users_home_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ADAPTERMESH_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelSettings().home == tmp_path / ".adaptermesh"


def test_the_environment_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAPTERMESH_HOME", str(tmp_path))
    assert ModelSettings().home == tmp_path
