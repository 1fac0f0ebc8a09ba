"""Manifests with groups of bottlenecks and with fusions: what is in order, and what is corrupt."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from adaptermesh.artifact.composing import compose
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.composition import parse_resolved
from adaptermesh.core.digests import canonical_json
from tests.parity.adapters.goldens import ingest_folder, load_goldens
from tests.unit.artifact.test_bottleneck_steps import FUSION, NAMES, adapter, fusion
from tests.unit.artifact.test_manifest import corruption

Json = dict[str, Any]
# In layer 1 one bottleneck, then two that are fused, then one; in layer 0 one, and one that is fused alone.
MEMBERS = {name: adapter(seed) for seed, name in enumerate(NAMES)} | {FUSION: fusion(2)}
ALL = "stack({0},fuse({f},{1},{2}),{3})".format(*NAMES, f=FUSION)


@pytest.fixture(name="value")
def _value() -> Json:
    found: Json = json.loads(compose(parse_resolved(ALL), MEMBERS).manifest.to_bytes())
    return found


def at(value: Json, layer: int) -> list[Json]:
    return [module for module in value["modules"] if module["layer"] == layer]


def reshape(value: Json, module: Json, slot: str, shape: list[int]) -> None:
    entry = next(entry for entry in value["tensors"] if entry["name"] == module["tensors"][slot])
    assert entry["shape"] != shape
    entry["shape"] = shape


def drop(value: Json, module: Json, *slots: str) -> None:
    """Leaves tensors out, as one who writes the manifest would."""
    names = {module["tensors"].pop(slot) for slot in slots}
    value["tensors"] = [entry for entry in value["tensors"] if entry["name"] not in names]
    size = sum(entry["size"] for entry in value["tensors"])
    value["cost"]["device_bytes"] = size


def remove(value: Json, *modules: Json) -> None:
    for module in modules:
        drop(value, module, *list(module["tensors"]))
        value["modules"].remove(module)
    value["op_kinds"] = sorted({module["op"] for module in value["modules"]})


def test_the_group_to_change_is_in_order(value: Json) -> None:
    assert [module.get("member", 0) for module in at(value, 1)] == [0, 1, 2, 3]
    assert Manifest.from_bytes(canonical_json(value)).op_kinds == ("bottleneck_group",)


GOOD: dict[str, Callable[[Json], object]] = {
    "other activations": lambda v: at(v, 1)[2]["options"].update(activation="tanh"),
    "another input in another step": lambda v: at(v, 1)[3]["options"].update(input="residual"),
    "a scale": lambda v: at(v, 1)[3].update(scale=2.5),
    "no value": lambda v: drop(v, at(v, 1)[1], "value"),
    "no biases": lambda v: drop(v, at(v, 1)[1], "query_bias", "key_bias"),
    "the last one less": lambda v: remove(v, at(v, 1)[3]),
    "one that is fused alone": lambda v: remove(v, *at(v, 1)[2:]),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_group_that_can_be_computed_is_read(value: Json, case: str) -> None:
    GOOD[case](value)
    Manifest.from_bytes(canonical_json(value))


BAD: dict[str, tuple[Callable[[Json], object], str]] = {
    "a missing member": (lambda v: remove(v, at(v, 1)[0]), "comes as number 0 of its group"),
    "another order": (lambda v: v["modules"].reverse(), "comes as number 0 of its group"),
    "one twice": (lambda v: at(v, 1)[2].update(member=1), "member 1 is listed twice"),
    "below nothing": (lambda v: at(v, 1)[0].update(member=-1), "comes as number 0"),
    "no number": (lambda v: at(v, 1)[1].update(member="1"), "member"),
    "spelt out": (lambda v: at(v, 1)[0].update(member=0), "canonical spelling"),
    "no step": (lambda v: at(v, 1)[0]["options"].pop("step"), "has options"),
    "an odd step": (lambda v: at(v, 1)[0]["options"].update(step="last"), "has step 'last'"),
    "an odd activation": (lambda v: at(v, 1)[0]["options"].update(activation="x"), "has activation 'x'"),
    "joins nothing": (
        lambda v: at(v, 1)[0]["options"].update(step="same"),
        "joins a step that fuses nothing",
    ),
    "joins one that fuses nothing": (
        lambda v: at(v, 1)[1]["options"].update(step="same"),
        "joins a step that fuses nothing",
    ),
    "joins as one that fuses": (
        lambda v: drop(v, at(v, 1)[1], "query", "query_bias", "key", "key_bias", "value"),
        "joins a step that fuses nothing",
    ),
    "fused and reads another": (
        lambda v: at(v, 1)[2]["options"].update(input="output"),
        "reads something else than what it is fused with",
    ),
    "fused and reads the residual": (
        lambda v: [module["options"].update(input="residual") for module in at(v, 1)],
        "is fused and reads the residual",
    ),
    "a query without a key": (lambda v: drop(v, at(v, 1)[1], "key"), "has slots"),
    "a value without a query": (
        lambda v: drop(v, at(v, 1)[1], "query", "query_bias", "key", "key_bias"),
        "has slots",
    ),
    "no down": (lambda v: drop(v, at(v, 1)[0], "down"), "has slots"),
    "a site": (lambda v: at(v, 1)[0].update(site="q"), "is at no block"),
    "a rank": (lambda v: at(v, 1)[0].update(rank=3), "has rank 3"),
    "an expert": (lambda v: at(v, 1)[0].update(expert=3), "has an expert"),
    "a wide query": (lambda v: reshape(v, at(v, 1)[1], "query", [32, 8]), "has query of shape"),
    "a long bias": (lambda v: reshape(v, at(v, 1)[1], "key_bias", [4, 4]), "has key_bias of shape"),
    "a wide value": (lambda v: reshape(v, at(v, 1)[1], "value", [8, 32]), "has value of shape"),
    "a wide up": (lambda v: reshape(v, at(v, 1)[1], "up", [2, 16]), "has up of shape"),
    "a group of one": (
        lambda v: remove(v, *at(v, 1)[1:]),
        "is a group of one",
    ),
    "a bottleneck beside it": (
        lambda v: at(v, 1)[0]["options"].pop("step") and at(v, 1)[0].update(op="bottleneck"),
        "is beside a bottleneck of no group",
    ),
    "another op in the group": (
        lambda v: at(v, 1)[3]["options"].pop("step") and at(v, 1)[3].update(op="bottleneck"),
        "is of no group",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_group_that_is_wrong_is_corrupt(value: Json, case: str) -> None:
    change, why = BAD[case]
    change(value)
    assert why in corruption(canonical_json(value))


@pytest.fixture(name="stored")
def _stored(tmp_path: Any) -> Json:
    goldens = load_goldens("llama")
    manifest = ingest_folder(goldens.folder("fusion"), goldens.facts, tmp_path / "out")
    found: Json = json.loads(manifest.to_bytes())
    return found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v["modules"][0].update(scale=2.0), "has scale 2.0 for nothing"),
        (lambda v: v["modules"][0].update(site="q"), "is at no block"),
        (lambda v: v["modules"][0].update(rank=1), "has rank 1"),
        (lambda v: v["modules"][0].update(member=1), "is of no group"),
        (lambda v: v["modules"][0]["options"].update(members="16"), "has members '16'"),
        (lambda v: v["modules"][0]["options"].update(query="residual"), "has query 'residual'"),
        (lambda v: v["modules"][0]["options"].pop("members"), "has options"),
        (lambda v: drop(v, v["modules"][0], "key"), "has slots"),
        (lambda v: reshape(v, v["modules"][0], "query", [16, 64]), "has query of shape"),
        (lambda v: v.update(servable=True, unservable_reason=""), "are not all served"),
        (lambda v: v.update(activation={"invocation_tokens": [1]}), "not servable has an activation"),
    ],
)
def test_a_fusion_that_is_wrong_is_corrupt(stored: Json, change: Callable[[Json], object], why: str) -> None:
    Manifest.from_bytes(canonical_json(stored))
    change(stored)
    assert why in corruption(canonical_json(stored))


def test_a_fusion_may_do_without_what_it_need_not_have(stored: Json) -> None:
    for module in stored["modules"]:
        drop(stored, module, "value", "query_bias", "key_bias")
    assert Manifest.from_bytes(canonical_json(stored)).op_kinds == ("fusion",)
