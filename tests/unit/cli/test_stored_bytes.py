"""`adapters verify` and `adapters gc` against a real store."""

from pathlib import Path

import pytest

from adaptermesh.core.digests import digest_bytes
from tests.unit.cli.conftest import Invoke, document
from tests.unit.store.conftest import BASE_NAME, make_files

FILES = make_files()
WEIGHTS = digest_bytes(FILES["adapter_model.safetensors"])


@pytest.fixture
def published(real_store: Path, invoke: Invoke, tmp_path: Path) -> Invoke:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path, data in FILES.items():
        (folder / path).write_bytes(data)
    result = invoke("adapters", "upload", str(folder), "acme/ner", "--base", BASE_NAME, "--license", "mit")
    assert result.exit_code == 0, result.output
    return invoke


def blob_of(store: Path, digest: str) -> Path:
    digits = digest.removeprefix("sha256:")
    return store / "blobs" / "sha256" / digits[:2] / digits[2:]


def test_verify_reads_everything_twice_and_says_so(published: Invoke) -> None:
    result = published("adapters", "verify", "acme/ner:v1")
    assert result.exit_code == 0, result.output
    assert "acme/ner:v1: all 9 checks passed" in result.stdout
    for words in ("download  canonical form", "store     manifest", "store     tensors", *FILES):
        assert words in result.stdout
    printed = document(published("adapters", "verify", "acme/ner:v1", "--json"))
    assert printed["version"]["ref"] == "acme/ner:v1"
    assert {check["problem"] for check in (*printed["downloaded"], *printed["stored"])} == {""}
    assert "the store: all 5 checks passed" in published("adapters", "verify", "--all").stdout


def test_verify_names_what_is_damaged_and_fails(published: Invoke, real_store: Path) -> None:
    digest = document(published("adapters", "show", "acme/ner:v1", "--json"))["version"]["digest"]
    blob = blob_of(real_store, WEIGHTS)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    result = published("adapters", "verify", "acme/ner:v1")
    assert result.exit_code == 1
    assert "2 of 9 checks failed" in result.stdout
    assert "it arrived as sha256:" in " ".join(result.stdout.split())
    everything = published("adapters", "verify", "--all")
    assert everything.exit_code == 1
    assert "1 of 5 checks failed" in everything.stdout

    blob_of(real_store, digest).write_bytes(b"{}")
    result = published("adapters", "verify", "acme/ner:v1", "--json")
    assert result.exit_code == 1
    assert "manifest has another digest" in result.stdout
    blob.unlink()
    result = published("adapters", "verify", "acme/ner:v1", "--json")
    assert "it is missing" in result.stdout


def test_verify_wants_a_version_or_all(published: Invoke) -> None:
    for arguments in ((), ("acme/ner:v1", "--all")):
        result = published("adapters", "verify", *arguments)
        assert result.exit_code == 1
        assert "name a version, or say --all" in result.stderr
    result = published("adapters", "verify", "acme/ner:v9")
    assert "VERSION_NOT_FOUND" in result.stderr


def test_gc_says_what_would_go_and_then_removes_it(published: Invoke, real_store: Path) -> None:
    lost = blob_of(real_store, digest_bytes(b"lost"))
    lost.parent.mkdir(exist_ok=True)
    lost.write_bytes(b"lost")
    (real_store / "blobs" / "tmp" / "half").write_bytes(b"half")
    assert "0 blobs (0 B) removed, left alone for the grace: 1, needed: 5" in (
        published("adapters", "gc").stdout
    )
    looked = published("adapters", "gc", "--dry-run", "--grace", "0s").stdout
    assert "1 blob (4 B) would be removed, 1 unfinished upload would be removed, needed: 5" in looked
    assert lost.exists()
    printed = document(published("adapters", "gc", "--grace", "0s", "--json"))
    assert (printed["removed_blobs"], printed["removed_bytes"], printed["dry_run"]) == (1, 4, False)
    assert not lost.exists()
    assert published("adapters", "verify", "acme/ner:v1").exit_code == 0


@pytest.mark.parametrize("grace", ["soon", "-1h", "1.5h", ""])
def test_gc_refuses_a_grace_that_is_no_time(invoke: Invoke, grace: str) -> None:
    result = invoke("adapters", "gc", "--grace", grace)
    assert result.exit_code == 1
    assert "is no time" in result.stderr
