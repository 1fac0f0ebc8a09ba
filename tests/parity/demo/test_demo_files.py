import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from adaptermesh.core.refs import AdapterName

DEMO = Path(__file__).resolve().parents[3] / "deploy" / "demo"
MANIFEST: dict[str, Any] = json.loads((DEMO / "demo.json").read_text("utf-8"))
SCORES: dict[str, Any] = json.loads((DEMO / "scores.json").read_text("utf-8"))
FOLDERS = [DEMO / version["dir"] for adapter in MANIFEST["adapters"] for version in adapter["versions"]]


def test_there_are_at_least_three_adapters_and_one_has_two_versions() -> None:
    assert len(MANIFEST["adapters"]) >= 3
    assert max(len(adapter["versions"]) for adapter in MANIFEST["adapters"]) >= 2
    for adapter in MANIFEST["adapters"]:
        AdapterName.parse(adapter["ref"])
        assert 3 <= len(adapter["prompts"]) <= 4


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_is_small_and_speaks_of_its_base_alone(folder: Path) -> None:
    assert (folder / "adapter_model.safetensors").stat().st_size < 2_000_000
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["r"] <= 8
    assert config["base_model_name_or_path"] == MANIFEST["base_model"]
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card
    text = card + json.dumps(config)
    assert not re.search(r"/(home|root|tmp|work)/", text), "a path of the machine it was trained on"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_layer_of_an_adapter_is_trained(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert len(tensors) == 30 * 2 * len(config["target_modules"])
    assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_is_far_better_than_the_base_on_prompts_it_has_not_seen(folder: Path) -> None:
    score = SCORES["adapters"][folder.name]
    assert score["held_out_prompts"] >= 20
    assert score["adapter"] >= score["base"] + 0.5
