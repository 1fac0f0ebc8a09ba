"""Manifests of what acts around the layers: each thing that can be wrong with one, and what is right."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from adaptermesh.artifact.manifest import Manifest
from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import MeshError, Reason
from tests.parity.adapters.goldens import ROOT, ingest_folder, load_goldens
from tests.unit.artifact.test_peft_beside import CASES, made, pytestmark
from tests.unit.artifact.test_peft_written import ingested

__all__ = ["pytestmark"]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        folder, facts = made(case, tmp_path_factory.mktemp("case"))
        found[case] = json.loads(ingested(folder, facts).manifest.to_bytes())
    goldens = load_goldens("llama")
    out: Path = tmp_path_factory.mktemp("golden") / "out"
    manifest = ingest_folder(ROOT / "llama" / "seq_bn_inv", goldens.facts, out)
    found["coupling"] = json.loads(manifest.to_bytes())
    return found


def test_what_is_written_is_read_again(manifests: dict[str, Any]) -> None:
    for value in manifests.values():
        data = canonical_json(value)
        assert Manifest.from_bytes(data).to_bytes() == data


def module_of(value: Any, op: str, site: str) -> Any:
    return next(one for one in value["modules"] if (one["op"], one["site"]) == (op, site))


@pytest.mark.parametrize(
    ("case", "op", "site", "change", "why"),
    [
        ("tokens", "token_rows", "embed", {"tokens": [9, 9]}, "2 tokens, not 1 to 65536 different ones"),
        ("tokens", "token_rows", "embed", {"tokens": [9, 64]}, "tokens 9 to 64 of a vocabulary of 64"),
        ("tokens", "token_rows", "embed", {"tokens": [-1, 4]}, "tokens -1 to 4 of a vocabulary"),
        ("tokens", "token_rows", "embed", {"tokens": [1, 2, 3]}, "has rows of shape (2, 16)"),
        ("tokens", "token_rows", "embed", {"scale": 2.0}, "has rank 0 and scale 2.0"),
        ("tokens", "token_rows", "embed", {"site": "q"}, "is neither at the embeddings nor at the head"),
        ("tokens", "token_rows", "embed", {"site": "final_norm"}, "is neither at the embeddings nor"),
        ("tokens", "token_rows", "embed", {"site": "lm_head"}, "is not of the layer to which its site"),
        ("tokens", "token_rows", "embed", {"expert": 1}, "is not of the layer to which its site"),
        ("tokens", "lowrank", "q", {"tokens": [1]}, "has tokens for nothing"),
        ("embeddings", "lowrank", "embed", {"site": "lm_head"}, "is not of the layer"),
        ("embeddings", "lowrank", "embed", {"rank": 3}, "has A of shape (2, 64)"),
        ("head", "lowrank", "lm_head", {"site": "final_norm"}, "can't be there"),
        ("head", "lowrank", "lm_head", {"rank": 3}, "has A of shape (2, 16)"),
        ("saved ends", "replace", "lm_head", {"scale": 2.0}, "scale 2.0 and 1 tensors"),
        ("saved ends", "replace", "lm_head", {"rank": 2}, "has rank 2"),
        ("saved ends", "replace", "lm_head", {"tensors": {"bias": "L1.lm_head.weight"}}, "has bias of shape"),
        ("saved ends", "replace", "embed", {"tensors": {"bias": "L0.embed.weight"}}, "has bias of shape"),
        ("saved ends", "replace", "embed", {"tensors": {}}, "and 0 tensors"),
        ("saved norms", "replace", "final_norm", {"layer": 0}, "in chunks of layer 1"),
        ("saved norms", "replace", "ffn_norm", {"site": "attention_norm"}, "is listed twice"),
        ("coupling", "coupling", "stream", {"site": "embed"}, "a place that is not before all layers"),
        ("coupling", "coupling", "stream", {"scale": 2.0}, "scale 2.0, at a place"),
        ("coupling", "coupling", "stream", {"options": {"activation": "sine"}}, "has activation 'sine'"),
    ],
)
def test_what_is_wrong_with_a_module_is_corrupt(
    manifests: dict[str, Any], case: str, op: str, site: str, change: dict[str, Any], why: str
) -> None:
    value = copy.deepcopy(manifests[case])
    module_of(value, op, site).update(change)
    with pytest.raises(MeshError) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert caught.value.reason is Reason.DATA_CORRUPT
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("case", "tensor", "why"),
    [
        ("saved norms", "L1.final_norm.weight", "has weight of shape (4, 4)"),
        ("saved ends", "L0.embed.weight", "has weight of shape"),
        ("embeddings", "L0.embed.A", "of shape"),
        ("coupling", "L0.stream.G_up", "has G_up of shape"),
        ("coupling", "L0.stream.F_down", "of shape"),
    ],
)
def test_a_tensor_of_another_shape_is_corrupt(
    manifests: dict[str, Any], case: str, tensor: str, why: str
) -> None:
    value = copy.deepcopy(manifests[case])
    entry = next(one for one in value["tensors"] if one["name"] == tensor)
    size = entry["size"] // 4
    entry["shape"] = [4, size // 4]
    with pytest.raises(MeshError) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("copies", "why"),
    [
        ({"embed": "x"}, "is not a digest"),
        ({"q": "sha256:" + "0" * 64}, "same_as_base names ['q']"),
        ({}, "canonical spelling"),
    ],
)
def test_copies_of_the_base_are_of_its_ends(manifests: dict[str, Any], copies: Any, why: str) -> None:
    value = copy.deepcopy(manifests["embeddings"])
    value["same_as_base"] = copies
    with pytest.raises(MeshError) as caught:
        Manifest.from_bytes(canonical_json(value))
    assert why in caught.value.message
