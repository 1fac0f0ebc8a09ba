"""A fusion that was uploaded alone: kept for compositions, or stored or refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import open_buffer, tensors
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.errors import MeshError, Reason
from tests.parity.adapters.goldens import ROOT, ingest_folder, load_goldens

GOLDENS = load_goldens("llama")
CONFIG, WEIGHTS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
MODULE = "model.layers.{}.output_adapters.adapter_fusion_layer.a,b."


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS.folder("fusion"), tmp_path / "a"))


def ingested(folder: Path, facts: BaseFacts = GOLDENS.facts) -> Manifest:
    return ingest_folder(folder, facts, folder.with_suffix(".canonical"))


def told(folder: Path, inner: dict[str, Any] | None = None, **top: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    raw["config"].update(inner or {})
    (folder / CONFIG).write_text(json.dumps({**raw, **top}))


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found: dict[str, Any] = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(MeshError) as caught:
        ingested(folder)
    assert caught.value.reason is Reason.ADAPTER_REJECTED
    return caught.value.message


def test_it_is_kept_tensor_by_tensor_and_says_how_to_ask_for_it(folder: Path) -> None:
    manifest = ingested(folder)
    assert (manifest.servable, manifest.kind, manifest.op_kinds) == (False, "fusion", ("fusion",))
    assert "ask for 'fuse(acme/fusion:v1,acme/one:v1,...)'" in manifest.unservable_reason
    assert manifest.unservable_reason.endswith("then of a, b")
    assert [(one.site, one.layer, one.options) for one in manifest.modules] == [
        ("ffn", layer, {"members": "2", "query": "input"}) for layer in (0, 1)
    ]
    uploaded = load_file(folder / WEIGHTS)
    slots = {
        **{slot: f"{slot}.weight" for slot in ("query", "key", "value")},
        **{f"{slot}_bias": f"{slot}.bias" for slot in ("query", "key")},
    }
    with open_buffer(folder.with_suffix(".canonical")) as buffer:
        found = {entry.name: values.copy() for entry, values in tensors(manifest, buffer)}
    assert len(found) == len(uploaded)
    for layer in (0, 1):
        for slot, source in slots.items():
            expected = uploaded[MODULE.format(layer) + source]
            np.testing.assert_array_equal(found[f"L{layer}.ffn.{slot}"], expected)


def test_where_its_library_looks_before_the_sum_its_query_is_the_output(folder: Path) -> None:
    told(folder, {"query_before_ln": True})
    assert {(one.options or {})["query"] for one in ingested(folder).modules} == {"output"}


def test_the_names_may_be_in_its_own_name_alone_and_say_how_many_there_are(folder: Path) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    del raw["adapter_names"]
    (folder / CONFIG).write_text(json.dumps(raw))
    assert ingested(folder).unservable_reason.endswith("then of a, b")
    told(folder, adapter_names=["x", "y", "z"])
    assert {(one.options or {})["members"] for one in ingested(folder).modules} == {"3"}


@pytest.mark.parametrize(
    "harmless",
    [
        {"value_before_softmax": False},
        {"regularization": False},
        {"dropout_prob": 0.1},
        {"value_initialized": ""},
    ],
)
def test_what_changes_no_answer_changes_nothing(folder: Path, harmless: dict[str, Any]) -> None:
    before = ingested(folder).modules
    told(folder, harmless)
    assert ingested(folder).modules == before


def test_without_a_value_it_has_none(folder: Path) -> None:
    told(folder, {"value": False})
    assert "value.weight' is not expected" in refusal(folder)
    changed(folder, lambda found: [found.pop(MODULE.format(layer) + "value.weight") for layer in (0, 1)])
    assert all("value" not in one.tensors for one in ingested(folder).modules)


@pytest.mark.parametrize(
    ("inner", "top", "why"),
    [
        ({"query": False}, {}, "query or key false"),
        ({"key": False}, {}, "query or key false"),
        ({"temperature": True}, {}, "temperature: shares that depend on how often"),
        ({"residual_before": True}, {}, "residual_before: a fusion that weighs the residual stream"),
        ({}, {"adapter_names": [f"a{n}" for n in range(16)]}, "a fusion of 16 adapters, the most is 15"),
    ],
)
def test_what_is_computed_otherwise_is_stored_with_the_reason(
    folder: Path, inner: dict[str, Any], top: dict[str, Any], why: str
) -> None:
    told(folder, inner, **top)
    manifest = ingested(folder)
    assert (manifest.servable, manifest.modules, manifest.tensors) == (False, (), ())
    assert manifest.unservable_reason.startswith("not served yet: ")
    assert why in manifest.unservable_reason


def test_an_lm_head_beside_one_has_to_be_the_bases(folder: Path) -> None:
    for name in ("head_config.json", "model_head.safetensors"):
        shutil.copy(GOLDENS.folder("with_lm_head") / name, folder / name)
    manifest = ingested(folder)
    assert manifest.unservable_reason.startswith("a fusion is served with the adapters")
    assert manifest.head is not None
    assert set(manifest.same_as_base) == {"lm_head"}


def test_one_for_an_encoder_is_stored(folder: Path) -> None:
    config = json.loads((ROOT / "bert" / "base" / "config.json").read_text())
    told(folder, model_type="bert")
    manifest = ingested(folder, BaseFacts.from_config("golden", config, "sha256:" + "0" * 64))
    assert "not served yet: a fusion in a BertForMaskedLM" in manifest.unservable_reason
    assert manifest.modules == ()


@pytest.mark.parametrize(
    ("inner", "top", "why"),
    [
        ({"query": None}, {}, "config: query"),
        ({"key": 1}, {}, "config: key"),
        ({"mixture": 3}, {}, "the key 'mixture' is unknown"),
        ({}, {"more": 3}, "the key 'more' is unknown"),
        ({}, {"config": None}, "config: Input should be a valid dictionary"),
        ({}, {"hidden_size": 31}, "hidden_size is 31"),
        ({}, {"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({}, {"name": "a.b"}, "name: String should match"),
        ({}, {"name": "b,a"}, "is of the adapter 'a,b', the config's name is 'b,a'"),
    ],
)
def test_a_config_that_is_none_is_refused(
    folder: Path, inner: dict[str, Any], top: dict[str, Any], why: str
) -> None:
    told(folder, inner, **top)
    assert why in refusal(folder)


FIRST = MODULE.format(0)
WIDE = np.ones((32, 16), np.float32)
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one less": (lambda found: found.pop(FIRST + "key.bias"), "but no key.bias"),
    "one more": (lambda found: found.update({FIRST + "value.bias": WIDE[0]}), "value.bias' is not expected"),
    "another shape": (lambda found: found.update({FIRST + "key.weight": WIDE}), r"expected [32, 32]"),
    "another dtype": (
        lambda found: found.update({FIRST + "key.bias": np.ones(32, np.float16)}),
        "of different dtypes",
    ),
    "a layer less": (
        lambda found: [found.pop(name) for name in list(found) if name.startswith(FIRST)],
        "layers.0.output_adapters' is asked for by the config, but the file has no tensors",
    ),
    "a layer more": (
        lambda found: found.update({MODULE.format(2) + "key.bias": WIDE[:, 0].copy()}),
        "is in layer 2",
    ),
    "elsewhere": (
        lambda found: found.update({"model.layers.0.mlp.adapter_fusion_layer.a,b.key.bias": WIDE[0].copy()}),
        "but the config asks for nothing there",
    ),
    "of an adapter": (
        lambda found: found.update({"model.layers.0.output_adapters.adapters.a,b.x": WIDE[0].copy()}),
        "the config asks for no such part",
    ),
    "of nothing else": (
        lambda found: [found.pop(name) for name in list(found)] + [found.setdefault("x", WIDE)],
        "it has no fusion of the name 'a,b' in any layer",
    ),
    "not finite": (lambda found: found[FIRST + "key.bias"].fill(np.nan), "has NaN"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_file_that_is_none_is_refused(folder: Path, case: str) -> None:
    change, why = BAD_TENSORS[case]
    changed(folder, change)
    assert why in refusal(folder)


def test_an_adapter_beside_it_is_refused(folder: Path) -> None:
    shutil.copy(GOLDENS.folder("seq_bn") / "adapter.safetensors", folder / "adapter.safetensors")
    assert f"one {WEIGHTS} must hold all tensors" in refusal(folder)
