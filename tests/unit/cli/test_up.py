import asyncio
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import typer

from adaptermesh.cli.commands.up import until_stopped
from adaptermesh.cli.mesh_events import EventPrinter
from adaptermesh.cli.output import Output
from adaptermesh.cli.settings import CliSettings
from adaptermesh.local import EventKind, LocalMesh, LocalMeshConfig, LocalMeshError, MeshEvent
from tests.unit.cli.conftest import Invoke


class QuietMesh(LocalMesh):
    """A mesh without services that notes what it is told."""

    def __init__(self, home: Path) -> None:
        super().__init__(LocalMeshConfig(home))
        self.told: list[str] = []
        self.slow = False

    async def stop(self) -> None:
        self.told.append("stop")
        while self.slow and "kill" not in self.told:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)

    def kill_all(self) -> None:
        self.told.append("kill")


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Output:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    return Output(CliSettings(), as_json=False)


async def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.Event().wait()


async def test_a_signal_ends_the_work_and_stops_the_mesh(output: Output, tmp_path: Path) -> None:
    mesh = QuietMesh(tmp_path)
    assert not await until_stopped(output, mesh, interrupt())
    assert mesh.told == ["stop"]


async def test_a_second_signal_kills(output: Output, tmp_path: Path) -> None:
    mesh = QuietMesh(tmp_path)
    mesh.slow = True
    await until_stopped(output, mesh, interrupt())
    assert mesh.told[:2] == ["stop", "kill"]


async def test_a_failure_stops_the_mesh_and_is_passed_on(output: Output, tmp_path: Path) -> None:
    mesh = QuietMesh(tmp_path)

    async def fail() -> None:
        raise LocalMeshError("the store keeps crashing")

    with pytest.raises(LocalMeshError):
        await until_stopped(output, mesh, fail())
    assert mesh.told == ["stop"]


def test_up_without_the_base_model_says_how_to_fetch_it(invoke: Invoke) -> None:
    result = invoke("up", "--ephemeral-ports")
    assert result.exit_code == 1
    assert "the base model 'smollm2-135m-instruct' is not in" in result.stderr
    assert "adaptermesh models pull smollm2-135m-instruct" in result.stderr


def test_up_with_a_plan_that_is_not_there_fails_before_anything_starts(
    invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("up", "--with-demo-adapters", "--demo-file", str(tmp_path / "none.json"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["message"].startswith("there is no")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("kind", [EventKind.SERVING, EventKind.CRASHED, EventKind.GIVEN_UP])
def test_events_are_lines_to_read_or_lines_of_json(kind: EventKind, output: Output, capsys: Any) -> None:
    event = MeshEvent(kind, "worker-0", "127.0.0.1:7710", 42, "why")
    EventPrinter(output, as_json=False)(event)
    assert isinstance(output.errors.file, io.StringIO)
    assert f"worker-0  {kind.value}" in output.errors.file.getvalue()


def test_the_base_models_are_left_to_the_workers_tool(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 7

    def run(command: list[str], check: bool) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr("adaptermesh.cli.commands.models.subprocess.run", run)
    assert invoke("models", "pull", "tiny", "--json").exit_code == 7
    assert invoke("models", "ls", "--home", str(tmp_path)).exit_code == 7
    home = str(tmp_path / "home")
    assert commands[0][1:] == ["-m", "adaptermesh.worker.models", "pull", "tiny", "--home", home, "--json"]
    assert commands[1][1:] == ["-m", "adaptermesh.worker.models", "ls", "--home", str(tmp_path)]


def all_commands() -> list[tuple[str, ...]]:
    from adaptermesh.cli.app import build_app

    group = typer.main.get_command(build_app())
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [(name, child) for child in inner] if inner else [(name,)]
    return found


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_takes_json_and_shows_an_example(command: tuple[str, ...], invoke: Invoke) -> None:
    text = invoke(*command, "--help").stdout
    assert "--json" in text
    assert f"adaptermesh {' '.join(command)}" in " ".join(text.split()).partition("Example")[2]


def test_the_commands_of_the_design_are_there() -> None:
    commands = {" ".join(command) for command in all_commands()}
    assert commands >= {
        "up",
        "status",
        "demo",
        "generate",
        "rollback",
        "models pull",
        "models ls",
        "adapters upload",
        "adapters download",
        "adapters search",
        "adapters ls",
        "adapters show",
        "alias set",
        "alias history",
        "routes set",
        "routes ls",
        "routes rm",
        "trace ls",
        "trace show",
    }
