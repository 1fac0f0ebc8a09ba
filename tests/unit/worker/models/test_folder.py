import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.models.cache import ModelCache
from adaptermesh.worker.models.pull import PullRequest, pull


@pytest.fixture
def source(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "tiny"))


def ignore(_: str) -> None:
    pass


def test_a_pulled_folder_loads_in_transformers(cache: ModelCache, source: Path) -> None:
    result = pull(PullRequest(str(source)), cache, ignore)
    assert not result.already_there
    model = AutoModelForCausalLM.from_pretrained(result.model.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.model.folder)
    assert model.config.hidden_size == 8
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1"


def test_the_weights_are_linked_not_copied(cache: ModelCache, source: Path) -> None:
    result = pull(PullRequest(str(source)), cache, ignore)
    assert (result.model.folder / "model.safetensors").samefile(source / "model.safetensors")


def test_a_second_pull_finds_the_model(cache: ModelCache, source: Path) -> None:
    first = pull(PullRequest(str(source)), cache, ignore)
    second = pull(PullRequest(str(source)), cache, ignore)
    assert second.already_there
    assert second.model == first.model


def test_another_model_under_the_same_name_is_refused(cache: ModelCache, source: Path) -> None:
    pull(PullRequest(str(source)), cache, ignore)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(MeshError, match="--id") as caught:
        pull(PullRequest(str(source)), cache, ignore)
    assert caught.value.reason is Reason.BASE_MISMATCH
    other = pull(PullRequest(str(source), model_id="tiny-b"), cache, ignore)
    assert other.model.facts.model_id == "tiny-b"


def test_only_known_files_are_taken(cache: ModelCache, source: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    (source / "extra.safetensors").write_bytes(b"")
    names = {path.name for path in pull(PullRequest(str(source)), cache, ignore).model.folder.iterdir()}
    assert names.isdisjoint({"pytorch_model.bin", "modeling_tiny.py", "extra.safetensors"})


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_needs_code_of_its_own_is_refused(cache: ModelCache, source: Path, file: str) -> None:
    content = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps({**content, "auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(MeshError, match="auto_map"):
        pull(PullRequest(str(source)), cache, ignore)
    assert cache.ls() == ()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_part_is_refused(cache: ModelCache, source: Path, file: str) -> None:
    (source / file).unlink()
    with pytest.raises(MeshError):
        pull(PullRequest(str(source)), cache, ignore)
    assert cache.ls() == ()


@pytest.mark.parametrize("name", ["no-such-model", "../nowhere", "a/b/c", ""])
def test_an_unknown_name_is_an_error_that_lists_what_there_is(cache: ModelCache, name: str) -> None:
    with pytest.raises(MeshError, match="smollm2-135m-instruct") as caught:
        pull(PullRequest(name), cache, ignore)
    assert caught.value.reason is Reason.BASE_NOT_FOUND
