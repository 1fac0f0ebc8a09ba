from pathlib import Path

import pytest
from pydantic_settings import SettingsConfigDict

from adaptermesh.rpc.settings import ServiceSettings


class Settings(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_THING_")


def test_the_shells_own_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "HOST", "PORT", "LOG_LEVEL", "TRACES"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.delenv("ADAPTERMESH_HOME", raising=False)
    settings = Settings()
    assert settings.home == Path("/elsewhere/.adaptermesh")
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.1", 0, "INFO")
    assert settings.trace_dir == settings.home / "traces"


def test_shared_settings_have_one_name_for_all_services_and_a_port_is_the_services_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADAPTERMESH_HOME", "/data")
    monkeypatch.setenv("ADAPTERMESH_TRACES", "")
    monkeypatch.setenv("ADAPTERMESH_THING_PORT", "7")
    settings = Settings()
    assert (settings.home, settings.port, settings.trace_dir) == (Path("/data"), 7, None)


def test_settings_can_be_given_by_name() -> None:
    assert Settings(home=Path("/x"), host="0.0.0.0").host == "0.0.0.0"
