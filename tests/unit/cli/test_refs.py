"""Refs in every spelling, for every command of adapters that takes one; and what each prints for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Invoke, Publish, document

Arguments = Callable[[str, Path], tuple[str, ...]]

COMMANDS: dict[str, Arguments] = {
    "download": lambda ref, folder: ("adapters", "download", ref, str(folder / "out")),
    "show": lambda ref, _: ("adapters", "show", ref),
    "verify": lambda ref, _: ("adapters", "verify", ref),
    "diff": lambda ref, _: ("adapters", "diff", ref, "acme/ner:v2"),
    "deprecate": lambda ref, _: ("adapters", "deprecate", ref, "--replacement", "acme/ner:v2"),
    "revoke": lambda ref, _: ("adapters", "revoke", ref, "--reason", "bad data"),
    "restore": lambda ref, _: ("adapters", "restore", ref),
    "history": lambda ref, _: ("adapters", "history", ref),
    "copy": lambda ref, _: ("adapters", "copy", ref, "shop/copy"),
    "export": lambda ref, folder: ("adapters", "export", ref, str(folder / "ner.tar")),
    "sign": lambda ref, folder: ("adapters", "sign", ref, "--key", str(folder / "key.pem")),
    "alias set": lambda ref, _: ("alias", "set", "acme/ner@canary", ref),
}


@pytest.fixture
def refs(publish: Publish, invoke: Invoke, tmp_path: Path) -> dict[str, str]:
    """The first of two versions, in every spelling."""
    ref = publish(seed=1)
    publish(seed=2)
    invoke("alias", "set", "acme/ner@latest", "v1")
    invoke("signing-keys", "create", str(tmp_path / "key.pem"))
    invoke("signing-keys", "add", "acme", str(tmp_path / "key.pem.pub"))
    digest = document(invoke("adapters", "show", ref, "--json"))["version"]["digest"]
    return {"number": ref, "alias": "acme/ner@latest", "digest": f"acme/ner@{digest}", "bare": "acme/ner"}


def versions_in(value: Any) -> set[str]:
    """Every ref of a version in a document."""
    if isinstance(value, dict):
        own = {value["ref"]} if ":v" in str(value.get("ref", "")) else set()
        return own.union(*map(versions_in, value.values()))
    return set[str]().union(*map(versions_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_ref_means_the_same_version_in_every_spelling(
    refs: dict[str, str], invoke: Invoke, tmp_path: Path, command: str
) -> None:
    key = (tmp_path / "key.pem").read_bytes()
    for spelling, ref in refs.items():
        folder = tmp_path / spelling
        folder.mkdir()
        (folder / "key.pem").write_bytes(key)
        (folder / "key.pem").chmod(0o600)
        printed = document(invoke(*COMMANDS[command](ref, folder), "--json"))
        if command == "alias set":
            assert printed["alias"]["version_number"] == 1
        elif command == "copy":
            assert printed["copy"]["source"] == "acme/ner:v1"
        else:
            assert "acme/ner:v1" in versions_in(printed)


@pytest.mark.parametrize("command", ["download", "verify", "history", "copy", "export", "revoke"])
def test_what_is_no_ref_is_refused_with_the_spellings(
    real_store: Path, invoke: Invoke, tmp_path: Path, command: str
) -> None:
    for ref in ("acme", "acme/ner:1", "acme/ner@sha256:12", "ACME/ner", "acme/ner:v0", "a/b@c@d", " "):
        result = invoke(*COMMANDS[command](ref, tmp_path), "--json")
        assert result.exit_code == 1, result.output
        error = json.loads(result.stdout)["error"]
        assert error["code"] == "INVALID_ARGUMENT"
        assert error["reason"] in {"INVALID_REF", "INVALID_NAME"}
