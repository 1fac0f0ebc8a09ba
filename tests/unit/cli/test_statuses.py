from tests.unit.cli.conftest import Invoke, Publish, document


def test_a_version_is_deprecated_and_whoever_looks_is_told_what_to_use(
    publish: Publish, invoke: Invoke
) -> None:
    first, second = publish(seed=1), publish(seed=2)
    done = invoke("adapters", "deprecate", first, "--replacement", second, "--reason", "old dates")
    assert done.stdout == "acme/ner:v1 is deprecated\n"
    shown = invoke("adapters", "show", first).stdout
    assert "deprecated: old dates; use acme/ner:v2" in shown
    status = document(invoke("adapters", "show", first, "--json"))["version"]["status"]
    assert (status["state"], status["replacement"], status["generation"]) == ("deprecated", second, 1)
    assert "deprecated" in invoke("adapters", "show", "acme/ner").stdout
    invoke("adapters", "deprecate", second)
    assert "v2 (deprecated)" in invoke("adapters", "ls").stdout


def test_a_revoked_version_is_refused_with_the_reason_and_can_be_looked_at(
    publish: Publish, invoke: Invoke, tmp_path: object
) -> None:
    first, second = publish(seed=1), publish(seed=2)
    invoke("alias", "set", "acme/ner@prod", "v1")
    done = invoke("adapters", "revoke", "acme/ner@prod", "--reason", "bad data", "--actor", "ada", "--json")
    assert document(done)["version"]["status"]["state"] == "revoked"
    refused = invoke("adapters", "download", first, f"{tmp_path}/out")
    assert refused.exit_code == 1
    assert "'acme/ner:v1' means acme/ner:v1, which is revoked: bad data" in refused.stderr
    assert "hint: use another version" in refused.stderr
    assert "revoked: bad data" in invoke("adapters", "show", first).stdout
    assert "prod=v1 (unusable)" in invoke("adapters", "ls").stdout
    assert invoke("alias", "set", "acme/ner@canary", "v1").exit_code == 1
    assert invoke("alias", "set", "acme/ner@prod", second).exit_code == 0


def test_a_version_is_restored(publish: Publish, invoke: Invoke, tmp_path: object) -> None:
    first = publish()
    invoke("adapters", "revoke", first, "--reason", "bad data")
    stale = invoke("adapters", "restore", first, "--expect", "0")
    assert (stale.exit_code, "STATUS_CONFLICT" in stale.stderr) == (1, True)
    assert invoke("adapters", "restore", first, "--expect", "1").stdout == "acme/ner:v1 is active\n"
    assert invoke("adapters", "download", first, f"{tmp_path}/out").exit_code == 0


def test_a_revocation_without_a_reason_is_a_usage_error(publish: Publish, invoke: Invoke) -> None:
    assert invoke("adapters", "revoke", publish()).exit_code == 2
