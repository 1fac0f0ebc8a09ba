import numpy as np
import pytest

from tests.unit.cli.conftest import Invoke, Publish, document
from tests.unit.store.conftest import LAYERS, make_tensors

CARD = """---
model-index:
- results:
  - task: {type: ner}
    metrics: [{type: f1, value: %s}]
---
Finds names.
"""


def test_the_same_version_differs_in_nothing(publish: Publish, invoke: Invoke) -> None:
    ref = publish()
    assert "are the same version" in invoke("adapters", "diff", ref, ref).stdout
    found = document(invoke("adapters", "diff", ref, ref, "--json"))
    assert (found["fields"], found["modules"]) == ([], [])
    assert [one["relative"] for one in found["tensors"]] == [0.0] * LAYERS


def test_a_modules_change_is_that_of_all_its_tensors(publish: Publish, invoke: Invoke) -> None:
    first, second = publish(seed=1), publish(seed=2)
    changes = document(invoke("adapters", "diff", first, second, "--json"))["tensors"]
    one, other = make_tensors(1), make_tensors(2)
    for layer, change in enumerate(changes):
        names = [name for name in one if f".layers.{layer}." in name]
        a = np.concatenate([one[name].ravel() for name in names]).astype(np.float64)
        b = np.concatenate([other[name].ravel() for name in names]).astype(np.float64)
        assert change["module"] == f"layer {layer} q lowrank"
        assert change["relative"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))


def test_fields_modules_and_metrics_are_put_side_by_side(publish: Publish, invoke: Invoke) -> None:
    first = publish(seed=1, card=CARD % "0.91")
    second = publish(seed=2, card=CARD % "0.93", lora_alpha=8)
    found = document(invoke("adapters", "diff", first, second, "--json"))
    fields = {one["field"]: (one["a"], one["b"]) for one in found["fields"]}
    assert fields["source.config.lora_alpha"] == (4, 8)
    assert {name for name in fields if name.startswith("source.files.")} == {
        f"source.files.{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    assert not {"chunks", "modules", "tensors", "namespace"} & fields.keys()
    assert [(one["a"]["scale"], one["b"]["scale"]) for one in found["modules"]] == [(2.0, 4.0)] * LAYERS
    (metric,) = found["metrics"]
    assert (metric["task"], metric["metric"], metric["a"], metric["b"]) == ("ner", "f1", 0.91, 0.93)
    shown = invoke("adapters", "diff", first, second).stdout
    for words in ("source.config.lora_alpha", "layer 0 q lowrank", "relative change", "0.91", "0.93"):
        assert words in shown


def test_modules_of_other_shapes_are_named_and_not_measured(publish: Publish, invoke: Invoke) -> None:
    first, second = publish(seed=1), publish("acme/wide", seed=2, rank=4)
    found = document(invoke("adapters", "diff", first, second, "--json"))
    assert [(one["a"]["rank"], one["b"]["rank"]) for one in found["modules"]] == [(2, 4)] * LAYERS
    assert found["tensors"] == []
    assert {one["field"] for one in found["fields"]} >= {"name", "cost.max_rank", "size_bytes"}
    assert "no module is in both" in invoke("adapters", "diff", first, second).stdout


def test_of_a_revoked_version_all_but_the_weights_are_compared(publish: Publish, invoke: Invoke) -> None:
    first, second = publish(seed=1), publish(seed=2)
    invoke("adapters", "revoke", first, "--reason", "bad data")
    assert document(invoke("adapters", "diff", first, second, "--json"))["tensors"] is None
    assert "the weights can't be compared" in invoke("adapters", "diff", first, second).stdout
