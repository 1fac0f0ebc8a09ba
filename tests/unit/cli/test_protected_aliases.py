from tests.unit.cli.conftest import Invoke, Publish, document


def test_a_protected_alias_moves_only_by_force(publish: Publish, invoke: Invoke) -> None:
    first, second = publish(seed=1), publish(seed=2)
    invoke("alias", "set", "acme/ner@prod", first)
    assert (
        invoke("alias", "protect", "acme/ner@prod", "-m", "the bank").stdout == "acme/ner@prod is protected\n"
    )
    for command in (("alias", "set", "acme/ner@prod", second), ("alias", "rm", "acme/ner@prod")):
        refused = invoke(*command)
        assert (refused.exit_code, "ALIAS_PROTECTED" in refused.stderr) == (1, True)
        assert "hint: give --force" in refused.stderr
    assert "-> v2" in invoke("alias", "set", "acme/ner@prod", second, "--force").stdout
    assert "-> v1" in invoke("rollback", "acme/ner@prod", "--force").stdout
    assert invoke("alias", "unprotect", "acme/ner@prod").stdout == "acme/ner@prod is unprotected\n"
    assert invoke("alias", "set", "acme/ner@prod", second).exit_code == 0
    moves = document(invoke("alias", "history", "acme/ner@prod", "--json"))["moves"]
    assert [move["action"] for move in moves] == ["set", "unprotected", "set", "set", "protected", "set"]
    assert "the bank" in invoke("alias", "history", "acme/ner@prod").stdout


def test_an_alias_is_removed_and_its_history_stays(publish: Publish, invoke: Invoke) -> None:
    invoke("alias", "set", "acme/ner@prod", publish())
    invoke("routes", "set", "ner", "acme/ner@prod")
    refused = invoke("alias", "rm", "acme/ner@prod")
    assert "ALIAS_IN_USE" in refused.stderr
    invoke("routes", "rm", "ner")
    removed = invoke("alias", "rm", "acme/ner@prod", "--expect", "1")
    assert removed.stdout == "acme/ner@prod removed; it pointed to v1\n"
    assert "ALIAS_NOT_FOUND" in invoke("adapters", "show", "acme/ner@prod").stderr
    assert "deleted" in invoke("alias", "history", "acme/ner@prod").stdout
