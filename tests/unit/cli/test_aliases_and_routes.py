from pathlib import Path

import pytest

from tests.unit.cli.conftest import FakeMesh, Invoke, document


@pytest.fixture(autouse=True)
def _two_versions(fakes: FakeMesh, invoke: Invoke, adapter_folder: Path) -> None:
    for text in ("one", "two"):
        (adapter_folder / "README.md").write_text(text)
        invoke("adapters", "upload", str(adapter_folder), "acme/ner", "--base", "tiny")


def test_an_alias_is_set_moved_rolled_back_and_its_history_shown(invoke: Invoke) -> None:
    assert "acme/ner@prod -> v1" in invoke("alias", "set", "acme/ner@prod", "v1").stdout
    moved = document(invoke("alias", "set", "acme/ner@prod", "v2", "-m", "better", "--actor", "me", "--json"))
    assert (moved["alias"]["version_number"], moved["alias"]["comment"]) == (2, "better")
    assert "acme/ner@prod -> v1" in invoke("rollback", "acme/ner@prod").stdout
    history = invoke("alias", "history", "acme/ner@prod").stdout
    assert "better" in history
    moves = document(invoke("alias", "history", "acme/ner@prod", "--json"))["moves"]
    assert [move["version_number"] for move in moves] == [1, 2, 1]


def test_a_stale_expectation_is_refused_with_a_hint(invoke: Invoke) -> None:
    invoke("alias", "set", "acme/ner@prod", "v1")
    result = invoke("alias", "set", "acme/ner@prod", "v2", "--expect", "0")
    assert result.exit_code == 1
    assert "ALIAS_CONFLICT" in result.stderr
    assert "alias history" in result.stderr


def test_a_refusal_as_json_is_a_document_too(invoke: Invoke) -> None:
    result = invoke("alias", "history", "acme/ner@nothing", "--json")
    assert result.exit_code == 1
    assert '"reason": "ALIAS_NOT_FOUND"' in result.stdout
    assert result.stderr.startswith("error: ")


def test_a_route_is_set_listed_and_removed(fakes: FakeMesh, invoke: Invoke) -> None:
    assert "*  ner -> acme/ner@prod" in invoke("routes", "set", "ner", "acme/ner@prod").stdout
    split = ("routes", "set", "ner", "acme/ner@prod=95", "acme/ner@canary=5", "--tenant", "acme")
    assert "acme/ner@prod 95%, acme/ner@canary 5%" in invoke(*split).stdout
    assert [target.weight for target in fakes.store.routes["acme", "ner"].targets] == [95, 5]
    listed = invoke("routes", "ls").stdout
    assert "acme/ner@canary 5%" in listed
    (route,) = document(invoke("routes", "ls", "--tenant", "acme", "--json"))["routes"]
    assert route["targets"][0] == {"ref": "acme/ner@prod", "weight": 95, "cohort": ""}
    assert "route removed" in invoke("routes", "rm", "ner", "--tenant", "acme").stdout
    assert invoke("routes", "rm", "ner", "--tenant", "acme").exit_code == 1


@pytest.mark.parametrize("target", ["acme/ner@prod=many", "=5", "acme/ner@prod=-1"])
def test_a_target_with_a_bad_weight_is_a_usage_error(invoke: Invoke, target: str) -> None:
    result = invoke("routes", "set", "ner", target)
    assert result.exit_code == 2
    assert "REF=WEIGHT" in result.stderr
