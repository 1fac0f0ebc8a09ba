"""`adapters rm` and `adapters history` against a real store."""

from pathlib import Path

import pytest

from tests.unit.cli.conftest import Invoke, Publish, document


def test_a_version_is_removed_and_whoever_asks_for_it_hears_why(
    publish: Publish, invoke: Invoke, tmp_path: Path
) -> None:
    first, _ = publish(seed=1), publish(seed=2)
    why = ("--reason", "uploaded by mistake", "--actor", "ada", "--yes")
    done = invoke("adapters", "rm", first, *why)
    assert done.stdout.startswith("acme/ner:v1 is removed (")
    for command in (
        ("show", first),
        ("download", first, f"{tmp_path}/out"),
        ("verify", first),
        ("rm", first),
    ):
        refused = invoke("adapters", *command)
        assert refused.exit_code == 1
        assert "means acme/ner:v1, which was removed at 20" in refused.stderr
        assert "by ada: uploaded by mistake" in refused.stderr
        assert "hint: use another version" in refused.stderr
    assert "acme/ner:v1" not in invoke("adapters", "show", "acme/ner").stdout


def test_an_adapter_of_which_nothing_is_left_says_so(publish: Publish, invoke: Invoke) -> None:
    invoke("adapters", "rm", publish(), "--yes")
    assert invoke("adapters", "show", "acme/ner").stdout == "no versions: all of them were removed\n"
    assert document(invoke("adapters", "show", "acme/ner", "--json"))["versions"] == []
    assert invoke("adapters", "ls").stdout == "no adapters\n"


def test_a_program_has_to_say_that_it_means_it(publish: Publish, invoke: Invoke) -> None:
    ref = publish()
    for options in ((), ("--json",)):
        refused = invoke("adapters", "rm", ref, *options)
        assert refused.exit_code == 1
        assert "acme/ner:v1 would be gone for good" in refused.stderr
    printed = document(invoke("adapters", "rm", ref, "--yes", "--json"))
    assert printed["deleted"]["ref"] == "acme/ner:v1"
    assert printed["feed_position"] > 0


@pytest.mark.parametrize(("answer", "left"), [("y\n", False), ("n\n", True), ("", True)])
def test_whoever_sits_at_a_terminal_is_asked(
    publish: Publish, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, answer: str, left: bool
) -> None:
    ref = publish()
    monkeypatch.setattr("adaptermesh.cli.commands.removing.at_terminal", lambda: True)
    result = invoke("adapters", "rm", ref, input=answer)
    assert "Remove acme/ner:v1 (" in result.stderr
    assert (result.exit_code == 0) is not left
    assert (invoke("adapters", "show", ref).exit_code == 0) is left


def test_what_is_in_use_stays_and_its_users_are_named(publish: Publish, invoke: Invoke) -> None:
    ref = publish()
    invoke("alias", "set", "acme/ner@prod", "v1")
    refused = invoke("adapters", "rm", "acme/ner@prod", "--yes")
    assert refused.exit_code == 1
    assert f"'{ref}' can't be removed: aliases point at it: prod" in " ".join(refused.stderr.split())
    assert "hint: move or remove what uses it first" in refused.stderr


def test_the_history_of_a_version_has_every_status_and_its_end(publish: Publish, invoke: Invoke) -> None:
    ref = publish()
    assert "nothing was ever said of acme/ner:v1" in invoke("adapters", "history", ref).stdout
    invoke("adapters", "deprecate", ref, "--reason", "old dates", "--actor", "ada")
    invoke("adapters", "revoke", ref, "--reason", "bad data", "--actor", "eve")
    digest = document(invoke("adapters", "show", ref, "--json"))["version"]["digest"]
    told = invoke("adapters", "history", f"acme/ner@{digest}").stdout.splitlines()
    assert [line.split()[1] for line in told[1:]] == ["revoked", "deprecated"]
    invoke("adapters", "rm", ref, "--yes", "--reason", "after all")
    printed = document(invoke("adapters", "history", ref, "--json"))
    assert [one["state"] for one in printed["statuses"]] == ["revoked", "deprecated"]
    assert printed["deletion"]["reason"] == "after all"
    assert "removed" in invoke("adapters", "history", ref).stdout
    assert "VERSION_NOT_FOUND" in invoke("adapters", "history", "acme/ner:v7").stderr


def test_a_version_that_must_not_be_used_can_be_verified(publish: Publish, invoke: Invoke) -> None:
    ref = publish()
    invoke("adapters", "revoke", ref, "--reason", "bad data")
    result = invoke("adapters", "verify", ref)
    assert (result.exit_code, "acme/ner:v1 (revoked): all 9 checks passed" in result.stdout) == (0, True)
    invoke("adapters", "restore", ref)
    invoke("signing-keys", "policy", "acme", "required")
    assert invoke("adapters", "verify", ref).exit_code == 0
