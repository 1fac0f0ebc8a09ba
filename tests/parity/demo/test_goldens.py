import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[2] / "deploy" / "demo"


@pytest.fixture(scope="module")
def goldens() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / "goldens.json").read_text("utf-8"))
    return content


def test_every_demo_adapter_and_the_base_have_goldens(goldens: dict[str, Any]) -> None:
    demo = json.loads((DEMO / "demo.json").read_text("utf-8"))
    versions = [version["dir"] for adapter in demo["adapters"] for version in adapter["versions"]]
    assert [entry["dir"] for entry in goldens["adapters"]] == [None, *versions]
    assert all(len(entry["answers"]) == 3 for entry in goldens["adapters"])


def test_the_goldens_belong_to_the_committed_adapters(goldens: dict[str, Any]) -> None:
    for entry in goldens["adapters"]:
        if entry["dir"] is not None:
            data = (DEMO / entry["dir"] / "adapter_model.safetensors").read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["name"]


def test_no_golden_hangs_on_a_near_tie(goldens: dict[str, Any]) -> None:
    margins = [answer["least_margin"] for entry in goldens["adapters"] for answer in entry["answers"]]
    assert min(margins) >= 0.02


def test_the_answers_of_the_adapters_differ_from_one_another(goldens: dict[str, Any]) -> None:
    texts = [answer["text"] for entry in goldens["adapters"] for answer in entry["answers"]]
    assert len(set(texts)) == len(texts)


@pytest.mark.model
def test_transformers_and_peft_still_give_the_golden_tokens(goldens: dict[str, Any], tmp_path: Path) -> None:
    # As a program of its own: these libraries warn, and here warnings are errors.
    made = tmp_path / "made.json"
    command = [sys.executable, str(HERE / "make_goldens.py"), "--only", "text-to-sql-v1", "--out", str(made)]
    subprocess.run(command, check=True, timeout=240)
    again = json.loads(made.read_text("utf-8"))
    assert again["base_digest"] == goldens["base_digest"]
    (entry,) = again["adapters"]
    (golden,) = [entry for entry in goldens["adapters"] if entry["name"] == "text-to-sql-v1"]
    assert [answer["prompt_ids"] for answer in entry["answers"]] == [
        answer["prompt_ids"] for answer in golden["answers"]
    ]
    assert [answer["token_ids"] for answer in entry["answers"]] == [
        answer["token_ids"] for answer in golden["answers"]
    ]
