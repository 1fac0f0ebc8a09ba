from pathlib import Path

import pytest

from tests.unit.cli.conftest import FakeMesh, Invoke, document


@pytest.fixture
def published(fakes: FakeMesh, invoke: Invoke, adapter_folder: Path) -> FakeMesh:
    for text in ("one", "two"):
        (adapter_folder / "README.md").write_text(text)
        options = ("--base", "tiny", "--task", "ner", "--tag", "x", "--license", "apache-2.0")
        result = invoke("adapters", "upload", str(adapter_folder), "acme/ner", *options)
        assert result.exit_code == 0, result.output
    return fakes


def test_upload_says_what_was_published_and_what_comes_next(
    fakes: FakeMesh, invoke: Invoke, adapter_folder: Path
) -> None:
    arguments = (
        "adapters",
        "upload",
        str(adapter_folder),
        "acme/ner",
        "--base",
        "tiny",
        "--tag",
        "a",
        "--tag",
        "b",
    )
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "acme/ner:v1 published" in result.stdout
    assert "warning: no license" in result.stdout
    assert "adaptermesh alias set acme/ner@prod v1" in result.stdout
    assert list(fakes.store.headers[0].tags) == ["a", "b"]
    assert "was there already" in invoke(*arguments).stdout


def test_upload_can_check_without_publishing(fakes: FakeMesh, invoke: Invoke, adapter_folder: Path) -> None:
    result = invoke("adapters", "upload", str(adapter_folder), "acme/ner", "--base", "tiny", "--check")
    assert "nothing was published" in result.stdout
    assert fakes.store.versions == {}


def test_upload_as_json_is_one_document(fakes: FakeMesh, invoke: Invoke, adapter_folder: Path) -> None:
    result = invoke("adapters", "upload", str(adapter_folder), "acme/ner", "--base", "tiny", "--json")
    printed = document(result)
    assert printed["created"] is True
    assert printed["version"]["ref"] == "acme/ner:v1"
    assert printed["version"]["create_time"].startswith("2026-01-02")
    assert result.stderr == ""


def test_pickled_weights_are_refused_with_advice(
    fakes: FakeMesh, invoke: Invoke, adapter_folder: Path
) -> None:
    (adapter_folder / "adapter_model.bin").write_bytes(b"x")
    result = invoke("adapters", "upload", str(adapter_folder), "acme/ner", "--base", "tiny")
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "safe_serialization=True" in result.stderr


def test_download_brings_the_files_back(published: FakeMesh, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("adapters", "download", "acme/ner:v2", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "acme/ner:v2: 3 files" in result.stdout
    assert (tmp_path / "out" / "README.md").read_text() == "two"
    (tmp_path / "out" / "README.md").write_text("mine")
    refused = invoke("adapters", "download", "acme/ner:v2", str(tmp_path / "out"))
    assert (refused.exit_code, (tmp_path / "out" / "README.md").read_text()) == (1, "mine")
    forced = invoke("adapters", "download", "acme/ner:v2", str(tmp_path / "out"), "--force", "--json")
    assert document(forced)["version"]["number"] == 2


def test_lists_show_the_newest_version_and_the_aliases(published: FakeMesh, invoke: Invoke) -> None:
    invoke("alias", "set", "acme/ner@prod", "v1")
    for command in (("adapters", "ls"), ("adapters", "search", "ner", "--task", "ner")):
        result = invoke(*command)
        assert "acme/ner" in result.stdout
        assert "prod=v1" in result.stdout
    assert "no adapters" in invoke("adapters", "search", "nothing").stdout
    (adapter,) = document(invoke("adapters", "ls", "--json"))["adapters"]
    assert adapter["newest"]["ref"] == "acme/ner:v2"


def test_a_search_asks_for_what_was_said_and_counts_what_was_found(
    published: FakeMesh, invoke: Invoke
) -> None:
    found = invoke(
        "adapters", "search", "ner", "--kind", "lora", "--license", "mit", "--tag", "a", "--facets"
    )
    assert "acme/ner" in found.stdout
    assert "ner 1" in found.stdout
    [asked] = published.store.searches
    assert (asked.text, asked.kind, asked.license, list(asked.tags)) == ("ner", "lora", "mit", ["a"])
    assert document(invoke("adapters", "search", "--facets", "--json"))["facets"] == {"task": [["ner", 1]]}
    refused = invoke("adapters", "search", "--sort", "size")
    assert refused.exit_code == 2
    assert "relevance" in refused.stderr


def test_show_lists_the_versions_of_an_adapter_or_tells_all_of_one(
    published: FakeMesh, invoke: Invoke
) -> None:
    invoke("alias", "set", "acme/ner@prod", "v1")
    versions = invoke("adapters", "show", "acme/ner")
    assert versions.stdout.index("acme/ner:v2") < versions.stdout.index("acme/ner:v1")
    one = invoke("adapters", "show", "acme/ner@prod")
    assert "adapter_model.safetensors" in one.stdout
    assert "apache-2.0" in one.stdout
    assert "lora (lowrank), rank 4" in one.stdout
    assert document(invoke("adapters", "show", "acme/ner:v1", "--json"))["manifest"] == {"schema": 1}
    assert document(invoke("adapters", "show", "acme/ner", "--json"))["aliases"] == {"prod": 1}


def test_an_unknown_adapter_is_an_error_with_a_hint(fakes: FakeMesh, invoke: Invoke) -> None:
    result = invoke("adapters", "show", "acme/nothing")
    assert result.exit_code == 1
    assert "adapter 'acme/nothing' does not exist" in result.stderr
    assert "ADAPTER_NOT_FOUND" in result.stderr
    assert "hint: `adaptermesh adapters ls` lists the adapters" in result.stderr
