from pathlib import Path

import pytest

from adaptermesh.artifact.signing import is_signature
from adaptermesh.client.private_key import PrivateKey, load_public_key
from adaptermesh.core.errors import MeshError
from tests.unit.cli.conftest import Invoke, Publish, document


def test_a_version_is_signed_with_a_key_that_its_namespace_trusts(
    publish: Publish, invoke: Invoke, tmp_path: Path
) -> None:
    ref, private, public = publish(), str(tmp_path / "k.pem"), str(tmp_path / "k.pem.pub")
    key_id = document(invoke("signing-keys", "create", private, "--json"))["key_id"]
    refused = invoke("adapters", "sign", ref, "--key", private)
    assert (refused.exit_code, "SIGNING_KEY_NOT_FOUND" in refused.stderr) == (1, True)
    added = invoke("signing-keys", "add", "acme", public, "-m", "release team")
    assert added.stdout == f"acme trusts {key_id}\n"
    assert invoke("adapters", "sign", ref, "--key", private).stdout == f"{ref} is signed by {key_id}\n"
    assert "(it was before)" in invoke("adapters", "sign", ref, "--key", private).stdout
    assert key_id in invoke("adapters", "show", ref).stdout
    (signature,) = document(invoke("adapters", "show", ref, "--json"))["signatures"]
    assert (signature["key_id"], signature["trusted"]) == (key_id, True)
    listed = invoke("signing-keys", "ls", "acme").stdout
    assert "signatures: none" in listed
    assert "release team" in listed


def test_a_namespace_that_requires_signatures_refuses_what_has_none(
    publish: Publish, invoke: Invoke, tmp_path: Path
) -> None:
    ref, private = publish(), str(tmp_path / "k.pem")
    key_id = document(invoke("signing-keys", "create", private, "--json"))["key_id"]
    invoke("signing-keys", "add", "acme", f"{private}.pub")
    assert invoke("signing-keys", "policy", "acme", "required").stdout == "signatures of acme: required\n"
    refused = invoke("alias", "set", "acme/ner@prod", ref)
    assert (refused.exit_code, "VERSION_UNSIGNED" in refused.stderr) == (1, True)
    assert "hint: `adaptermesh adapters sign" in refused.stderr
    assert invoke("adapters", "sign", ref, "--key", private).exit_code == 0
    assert invoke("alias", "set", "acme/ner@prod", ref).exit_code == 0
    assert invoke("signing-keys", "rm", "acme", key_id).exit_code == 0
    assert "not trusted any more" in invoke("adapters", "show", ref).stdout
    assert "prod=v1 (unusable)" in invoke("adapters", "ls").stdout
    assert invoke("signing-keys", "policy", "acme", "none", "--expect", "9").exit_code == 1
    assert invoke("signing-keys", "policy", "acme", "none").exit_code == 0
    assert "no trusted keys" in invoke("signing-keys", "ls", "acme").stdout


def test_a_key_is_for_its_owner_only_and_never_overwrites(invoke: Invoke, tmp_path: Path) -> None:
    private = tmp_path / "k.pem"
    assert invoke("signing-keys", "create", str(private)).exit_code == 0
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes()
    again = invoke("signing-keys", "create", str(private))
    assert (again.exit_code, private.read_bytes()) == (1, before)
    private.unlink()
    assert invoke("signing-keys", "create", str(private)).exit_code == 1
    assert not private.exists()


def test_keys_that_were_saved_are_the_same_when_loaded(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    key.save(tmp_path / "k", tmp_path / "k.pub")
    loaded, digest = PrivateKey.load(tmp_path / "k"), "sha256:" + "0" * 64
    assert load_public_key(tmp_path / "k.pub") == loaded.public_key == key.public_key
    assert is_signature(key.public_key, loaded.sign(digest), digest)
    assert not is_signature(key.public_key, loaded.sign(digest), "sha256:" + "1" * 64)


@pytest.mark.parametrize(
    "text", [None, "", "secret", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"]
)
def test_what_is_no_key_is_refused_without_quoting_it(tmp_path: Path, text: str | None) -> None:
    place = tmp_path / "k"
    if text is not None:
        place.write_text(text)
    for load in (PrivateKey.load, load_public_key):
        with pytest.raises(MeshError) as caught:
            load(place)
        assert "secret" not in caught.value.message
        assert "c2Vj" not in caught.value.message
