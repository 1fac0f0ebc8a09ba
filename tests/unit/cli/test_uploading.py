"""`adapters upload`: in parts, and tried out without a store."""

import json
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.client import Progress, StoreClient
from tests.unit.cli.conftest import Invoke, document
from tests.unit.store.conftest import BASE_NAME, base_model, make_files

OPTIONS = ("acme/ner", "--base", BASE_NAME, "--license", "mit")
NO_STORE = "127.0.0.1:9"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter")


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for path, data in make_files(rank=8, **config).items():
        (folder / path).write_bytes(data)
    return folder


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The base in the model cache of the test's home; returns its file."""
    base = base_model()
    facts = BaseFacts.from_config(base.model_id, json.loads(base.config_json), base.weights_digest)
    place = tmp_path / "home" / "models" / base.model_id
    place.mkdir(parents=True)
    (place / "base_model.json").write_text(json.dumps(facts.to_json()))
    return place / "base_model.json"


def test_a_dry_run_tells_what_the_store_would_make_of_it(
    cached: Path, real_store: Path, folder: Path, invoke: Invoke
) -> None:
    tried = document(
        invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run", "--store", NO_STORE, "--json")
    )
    assert (tried["kind"], tried["max_rank"], tried["sites"], tried["modules"]) == ("lora", 8, ["q"], 3)
    assert tried["base_digest"] == base_model().digest
    assert [file["path"] for file in tried["files"]] == sorted(make_files())
    assert document(invoke("adapters", "ls", "--json"))["adapters"] == []
    version = document(invoke("adapters", "upload", str(folder), *OPTIONS, "--json"))["version"]
    for name in ("digest", "kind", "max_rank", "size_bytes", "warnings", "files"):
        assert tried[name] == version["source_files" if name == "files" else name]


def test_a_dry_run_can_be_read(cached: Path, folder: Path, invoke: Invoke) -> None:
    (folder / "README.md").unlink()
    result = invoke("adapters", "upload", str(folder), *OPTIONS[:3], "--dry-run", "--store", NO_STORE)
    assert result.exit_code == 0, result.output
    for words in (
        "acme/ner: every check passed, nothing was sent",
        "lora, rank 8",
        "q (3 modules)",
        "adapter_model.safetensors",
        "warning: no licence is given",
        "warning: the card (README.md) is absent or empty",
    ):
        assert words in result.stdout


def test_a_dry_run_names_every_reason_for_a_refusal(cached: Path, tmp_path: Path, invoke: Invoke) -> None:
    folder = write(tmp_path / "wrong", lora_alpha=-1, r=3, unknown_key=True)
    result = invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run", "--store", NO_STORE)
    assert result.exit_code == 1
    assert "ADAPTER_REJECTED" in result.stderr
    assert result.stderr.count("\n- ") > 1
    assert invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run", "--json").exit_code == 1


def test_a_dry_run_asks_a_store_for_a_base_that_is_not_in_the_cache(
    real_store: Path, folder: Path, invoke: Invoke
) -> None:
    for base in (BASE_NAME, base_model().digest):
        options = ("acme/ner", "--base", base, "--dry-run", "--json")
        tried = document(invoke("adapters", "upload", str(folder), *options))
        assert tried["base_digest"] == base_model().digest
    result = invoke("adapters", "upload", str(folder), "acme/ner", "--base", "other", "--dry-run")
    assert result.exit_code == 1
    assert "models pull other" in result.stderr


def test_a_dry_run_without_cache_and_store_says_how_to_get_the_base(folder: Path, invoke: Invoke) -> None:
    result = invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run", "--store", NO_STORE)
    assert result.exit_code == 1
    assert f"no store answers at {NO_STORE}" in result.stderr
    assert f"models pull {BASE_NAME}" in result.stderr


def test_a_damaged_cache_is_told(cached: Path, folder: Path, invoke: Invoke) -> None:
    cached.write_text("{")
    result = invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run")
    assert result.exit_code == 1
    assert "is damaged" in result.stderr
    facts = {"model_id": BASE_NAME, "digest": "sha256:" + "0" * 64, "config": {}, "weights_digest": ""}
    cached.write_text(json.dumps(facts))
    assert invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run").exit_code == 1


def test_the_store_checks_or_this_machine_not_both(folder: Path, invoke: Invoke) -> None:
    assert invoke("adapters", "upload", str(folder), *OPTIONS, "--dry-run", "--check").exit_code == 2


def test_an_upload_in_parts_goes_on_with_the_same_command(
    real_store: Path, folder: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed = StoreClient.complete_upload

    async def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreClient, "complete_upload", interrupt)
    arguments = ("adapters", "upload", str(folder), *OPTIONS, "--in-parts")
    assert invoke(*arguments).exit_code == 130
    (kept,) = (tmp_path / "home" / "uploads").iterdir()
    monkeypatch.setattr(StoreClient, "complete_upload", completed)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "acme/ner:v1 published" in result.stdout
    assert "had been sent before" in result.stdout
    assert not kept.exists()
    again = document(invoke(*arguments, "--json"))
    assert (again["created"], again["resumed_bytes"]) == (False, 0)


def test_the_progress_of_parts_reaches_the_end(
    real_store: Path, folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    upload = StoreClient.upload

    async def watched(*arguments: object, **options: object) -> object:
        return await upload(*arguments, **{**options, "progress": seen.append})  # type: ignore[arg-type]

    monkeypatch.setattr(StoreClient, "upload", watched)
    assert invoke("adapters", "upload", str(folder), *OPTIONS, "--in-parts").exit_code == 0
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0
