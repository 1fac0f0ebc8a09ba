"""Keys, tenants, grants and the audit log from the command line, at a store that asks for keys."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.unit.cli.conftest import Invoke, document

KeyFor = Callable[..., str]


@pytest.fixture
def key_for(keyed_store: Path, invoke: Invoke) -> KeyFor:
    def make(tenant: str, *roles: str) -> str:
        assert invoke("tenants", "set", tenant).exit_code == 0
        options = [option for role in roles for option in ("--role", role)]
        result = invoke("keys", "create", "--tenant", tenant, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout.strip()

    return make


def refused(result: Result, reason: str) -> None:
    assert result.exit_code == 1
    assert reason in result.stderr
    assert "hint: " in result.stderr


def test_without_a_key_a_command_says_where_to_put_one(
    keyed_store: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ADAPTERMESH_API_KEY")
    result = invoke("tenants", "ls")
    refused(result, "KEY_INVALID")
    assert "ADAPTERMESH_API_KEY" in result.stderr


def test_a_key_is_printed_once_and_alone_and_works_until_it_is_revoked(
    key_for: KeyFor, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = invoke("whoami").stdout
    assert "the whole mesh" in root
    secret = key_for("acme", "reader", "publisher")
    key_id = secret[:12]
    listed = invoke("keys", "ls", "--tenant", "acme")
    assert key_id in listed.stdout
    assert secret[13:] not in listed.stdout + invoke("keys", "ls", "--json").stdout
    monkeypatch.setenv("ADAPTERMESH_API_KEY", secret)
    mine = document(invoke("whoami", "--json"))
    assert (mine["key_id"], mine["tenant"], mine["roles"]) == (key_id, "acme", ["publisher", "reader"])
    refused(invoke("keys", "create", "--role", "reader"), "PERMISSION_DENIED")
    monkeypatch.setenv("ADAPTERMESH_API_KEY", "root-" + "r" * 40)
    assert invoke("keys", "revoke", key_id).stdout == f"{key_id} of tenant acme is revoked\n"
    assert "(it was before)" in invoke("keys", "revoke", key_id).stdout
    assert "revoked" in invoke("keys", "ls").stdout
    refused(invoke("keys", "revoke", "amk_notthere"), "KEY_NOT_FOUND")
    monkeypatch.setenv("ADAPTERMESH_API_KEY", secret)
    refused(invoke("whoami"), "KEY_INVALID")


def test_tenants_and_namespaces_show_what_they_hold_and_may_hold(keyed_store: Path, invoke: Invoke) -> None:
    made = invoke("tenants", "set", "acme-corp", "--max-versions", "3", "--max-bytes", str(2**20))
    assert made.stdout == "tenant acme-corp: 3 versions, 1.0 MiB\n"
    refused(invoke("tenants", "set", "acme-corp", "--expect", "9"), "TENANT_CONFLICT")
    given = invoke("namespaces", "set", "acme", "acme-corp")
    assert given.stdout == "namespace acme belongs to tenant acme-corp\n"
    refused(invoke("namespaces", "set", "acme", "nobody"), "TENANT_NOT_FOUND")
    assert "acme-corp" in invoke("namespaces", "ls").stdout
    assert invoke("namespaces", "ls", "--tenant", "default").stdout == "no namespaces\n"
    (tenant, default) = document(invoke("tenants", "ls", "--json"))
    assert (tenant["name"], tenant["usage"]) == ("acme-corp", {"bytes": 0, "versions": 0})
    assert default["name"] == "default"


def test_grants_are_set_listed_and_taken_back(key_for: KeyFor, invoke: Invoke) -> None:
    key_for("acme-corp", "admin")
    invoke("namespaces", "set", "acme", "acme-corp")
    one = invoke("grants", "set", "acme/ner", "acme-corp", "--role", "reader")
    assert one.stdout == "tenant acme-corp may act as reader in acme/ner\n"
    all_of_it = invoke("grants", "set", "acme", "*", "--role", "reader", "--role", "deployer")
    assert all_of_it.stdout == "everybody may act as deployer, reader in acme/*\n"
    assert "acme/ner" in invoke("grants", "ls", "acme").stdout
    assert [grant["name"] for grant in document(invoke("grants", "ls", "--to", "*", "--json"))] == [""]
    assert "granted nothing more" in invoke("grants", "rm", "acme/*", "*").stdout
    refused(invoke("grants", "rm", "acme", "*"), "GRANT_NOT_FOUND")
    refused(invoke("grants", "set", "other", "*", "--role", "reader"), "NAMESPACE_NOT_FOUND")
    assert invoke("grants", "ls").exit_code == 1
    assert invoke("grants", "set", "acme", "*").exit_code == 2


def test_the_audit_log_is_read_by_what_and_when(key_for: KeyFor, invoke: Invoke) -> None:
    key_id = key_for("acme-corp", "admin")[:12]
    invoke("namespaces", "set", "acme", "acme-corp", "--actor", "ada")
    table = invoke("audit").stdout
    assert "namespace_set" in table
    assert "ada" in table
    entries = document(invoke("audit", "--subject", key_id, "--json"))
    assert [(entry["action"], entry["key_id"]) for entry in entries] == [("api_key_set", "root")]
    assert invoke("audit", "--since", "2999-01-01").stdout == "nothing was changed\n"
    assert len(document(invoke("audit", "--limit", "1", "--json"))) == 1
