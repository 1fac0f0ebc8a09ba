import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptermesh.worker.models.__main__ import main


def test_pull_and_ls_print_json_on_standard_output_alone(
    model_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", str(model_folder), "--id", "tiny", "--home", str(home), "--json"]) == 0
    printed = capsys.readouterr()
    pulled = json.loads(printed.out)
    assert pulled["model_id"] == "tiny"
    assert pulled["path"] == str(home / "models" / "tiny")
    assert not pulled["already_there"]
    assert "tiny is ready" in printed.err

    assert main(["pull", str(model_folder), "--id", "tiny", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_there"]

    assert main(["ls", "--home", str(home), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["models"]
    assert listed["digest"] == pulled["digest"]


def test_ls_prints_one_line_for_each_model(
    model_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pull", str(model_folder), "--id", "tiny", "--home", str(home)])
    capsys.readouterr()
    assert main(["ls", "--home", str(home)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("tiny  LlamaForCausalLM")


def test_an_empty_cache_lists_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}


def test_an_error_is_one_line_and_typed_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "no-such-model", "--home", str(home), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["reason"] == "BASE_NOT_FOUND"
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")


def test_the_module_runs_as_a_program_and_takes_its_home_from_the_environment(home: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "adaptermesh.worker.models", "pull", "no-such-model"],
        env={**os.environ, "ADAPTERMESH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "adaptermesh.worker.models", "ls", "--json"],
        env={**os.environ, "ADAPTERMESH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(listed.stdout) == {"models": []}
