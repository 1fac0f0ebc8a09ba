import json
import threading
from pathlib import Path

import pytest

from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.models.cache import FACTS_FILE, ModelCache
from adaptermesh.worker.models.folder import fill_from_folder


def publish(cache: ModelCache, model_id: str, source: Path) -> None:
    cache.publish(model_id, lambda folder: fill_from_folder(source, folder))


def test_a_published_model_is_found_with_its_facts(cache: ModelCache, model_folder: Path) -> None:
    publish(cache, "tiny", model_folder)
    model = cache.find("tiny")
    assert model is not None
    assert model.facts.model_id == "tiny"
    assert model.facts.architecture == "LlamaForCausalLM"
    assert (model.facts.hidden_size, model.facts.num_layers, model.facts.vocab_size) == (8, 2, 16)
    assert [entry.facts.model_id for entry in cache.ls()] == ["tiny"]


def test_a_failed_publish_leaves_nothing_behind(cache: ModelCache, home: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.publish("tiny", fail)
    assert cache.find("tiny") is None
    assert cache.ls() == ()
    assert [path.name for path in (home / "models").iterdir()] == [".tiny.lock"]


def test_two_pulls_of_one_model_fill_it_once(cache: ModelCache, model_folder: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()
    notes: list[str] = []
    waiting = threading.Event()
    fills: list[str] = []

    def first(folder: Path) -> None:
        fills.append("first")
        entered.set()
        assert go_on.wait(30)
        fill_from_folder(model_folder, folder)

    def note(text: str) -> None:
        notes.append(text)
        waiting.set()

    one = threading.Thread(target=cache.publish, args=("tiny", first))
    two = threading.Thread(target=cache.publish, args=("tiny", lambda _: fills.append("second"), note))
    one.start()
    assert entered.wait(30)
    two.start()
    assert waiting.wait(30)
    go_on.set()
    one.join(30)
    two.join(30)
    assert fills == ["first"]
    assert "under way" in notes[0]
    assert cache.find("tiny") is not None


def test_a_config_changed_afterwards_is_found_out(cache: ModelCache, model_folder: Path, home: Path) -> None:
    publish(cache, "tiny", model_folder)
    file = home / "models" / "tiny" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(MeshError, match="gives digest") as caught:
        cache.find("tiny")
    assert caught.value.reason is Reason.DATA_CORRUPT


def test_a_folder_without_facts_is_no_model(cache: ModelCache, model_folder: Path, home: Path) -> None:
    publish(cache, "tiny", model_folder)
    (home / "models" / "tiny" / FACTS_FILE).unlink()
    with pytest.raises(MeshError, match="no whole model folder"):
        cache.ls()


def test_a_model_is_located_by_id_by_hub_name_and_by_folder(cache: ModelCache, model_folder: Path) -> None:
    publish(cache, "org--tiny", model_folder)
    found = cache.find("org--tiny")
    assert found is not None
    assert cache.locate("org--tiny") == cache.locate("Org/Tiny") == cache.locate(str(found.folder)) == found


@pytest.mark.parametrize("name", ["unknown", "../models", "", "Org/Unknown"])
def test_a_model_that_is_not_there_is_named_with_the_way_to_get_it(cache: ModelCache, name: str) -> None:
    with pytest.raises(MeshError, match="adaptermesh models pull") as caught:
        cache.locate(name)
    assert caught.value.reason is Reason.BASE_NOT_FOUND


def test_a_folder_with_a_config_alone_is_located_for_dummy_weights(
    cache: ModelCache, home: Path, tmp_path: Path
) -> None:
    for folder in (home / "models" / "tiny", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert cache.locate_config("tiny") == home / "models" / "tiny"
    assert cache.locate_config(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["unknown", ""])
def test_a_folder_without_a_config_is_not_located(cache: ModelCache, name: str) -> None:
    with pytest.raises(MeshError, match=r"no folder with a config\.json") as caught:
        cache.locate_config(name)
    assert caught.value.reason is Reason.BASE_NOT_FOUND
