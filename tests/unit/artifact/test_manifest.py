import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import MAX_MANIFEST_BYTES, Manifest
from adaptermesh.core.digests import canonical_json, digest_bytes
from adaptermesh.core.errors import Code, MeshError, Reason

DIGEST = "sha256:" + "1" * 64


@pytest.fixture
def manifest(folder: Any) -> Manifest:
    result: Manifest = folder.fill().ingest().manifest
    return result


def corruption(data: bytes) -> str:
    with pytest.raises(MeshError) as caught:
        Manifest.from_bytes(data)
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, Reason.DATA_CORRUPT)
    return caught.value.message


def test_the_digest_is_that_of_the_canonical_bytes(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert manifest.digest == digest_bytes(data)
    assert canonical_json(json.loads(data)) == data
    assert Manifest.from_bytes(data) == manifest


def test_every_field_of_the_canonical_form_is_there_from_the_start(manifest: Manifest) -> None:
    value = json.loads(manifest.to_bytes())
    assert set(value) >= {
        *(
            "schema",
            "name",
            "namespace",
            "created",
            "author",
            "license",
            "base",
            "tokenizer",
            "source",
            "kind",
        ),
        *("servable", "unservable_reason", "modules", "activation", "head", "composition", "parents"),
        *("merge_recipe", "training_data", "metrics", "tags", "languages", "golden_probe", "cost", "chunks"),
    }
    assert value["golden_probe"] is None
    assert value["parents"] == []
    assert set(value["modules"][0]) == {"site", "layer", "expert", "op", "rank", "scale", "dtype", "tensors"}


Edit = Callable[[dict[str, Any]], object]


def edits(value: dict[str, Any], path: str, new: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = value
    for part in parents:
        at = at[part]
    at[last] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("schema", "adaptermesh.manifest.v2", "schema"),
        ("name", "Bad Name", "not a legal name"),
        ("namespace", 3, "namespace"),
        ("base.digest", "x", "not a digest"),
        ("base.num_layers", 0, "not positive"),
        ("base.num_layers", 1, "outside of the base"),
        ("source.files.0.sha256", "x", "bad digest"),
        ("source.files.0.size_bytes", -1, "bad digest or size"),
        ("source.files.1.path", "README.md", "listed twice"),
        ("parents", ["x"], "not a digest"),
        ("kind", None, "kind"),
        ("size_bytes", 1, "the file has 1"),
        ("size_bytes", "1", "size_bytes"),
        ("chunks", [], "first chunk"),
        ("chunks.0.layer", 0, "first chunk"),
        ("chunks.0.offset", 64, "begins at 64"),
        ("chunks.1.offset", 0, "begins at 0"),
        ("chunks.1.size", 0, "not 1 to"),
        ("chunks.1.size", 2**21, "not 1 to"),
        ("chunks.1.size", 64, "begins at"),
        ("chunks.1.sha256", "x", "no digest"),
        ("chunks.2.layer", -1, "after layer"),
        ("chunks.1.layer", 1, "in chunks of layer"),
        ("tensors.0.name", "L0.q.B", "listed twice"),
        ("tensors.0.name", "other", "absent or used twice"),
        ("tensors.0.dtype", "F64", "dtype"),
        ("tensors.0.dtype", "F16", "needs"),
        ("tensors.0.shape", [], "shape"),
        ("tensors.0.shape", [0, 4], "shape"),
        ("tensors.0.shape", [4, 16.0], "shape"),
        ("tensors.0.offset", 0, "overlaps"),
        ("tensors.1.offset", 1, "not aligned"),
        ("tensors.11.offset", 2**20, "past the end"),
        ("modules.0.op", "magic", "no such op"),
        ("modules.0.op", "prompt", "has slots"),
        ("modules.0.layer", 3, "outside of the base"),
        ("modules.0.layer", -1, "outside of the base"),
        ("modules.0.rank", 0, "has rank 0"),
        ("modules.0.rank", 5, "A of shape"),
        ("modules.0.rank", 4.5, "rank"),
        ("modules.0.scale", 0.0, "scale"),
        ("modules.0.scale", -1.0, "scale"),
        ("modules.0.dtype", "F16", "dtype"),
        ("modules.0.options", {"input": "sum"}, "has options"),
        ("modules.0.options", {}, "canonical spelling"),
        ("modules.0.options", None, "canonical spelling"),
        ("modules.0.tensors", {"A": "L0.q.A"}, "has slots"),
        ("modules.0.tensors", {"A": "L0.q.A", "B": "L0.q.A"}, "used twice"),
        ("modules.0.tensors.A", "L1.q.A", "in chunks of layer 1"),
        ("modules.1.site", "q", "listed twice"),
        ("modules", [], "belongs to no module"),
        ("op_kinds", [], "op_kinds"),
        ("cost.max_rank", 9, "max_rank"),
        ("cost.device_bytes", 9, "device_bytes"),
        ("servable", False, "disagree"),
        ("servable", 1, "servable"),
        ("unservable_reason", "why", "disagree"),
        ("tokenizer", [], "tokenizer"),
        ("activation", {}, "activation.invocation_tokens"),
        ("activation", {"invocation_tokens": []}, "0 invocation tokens"),
        ("activation", {"invocation_tokens": [1] * 257}, "257 invocation tokens"),
        ("activation", {"invocation_tokens": [3, 64]}, "invocation token 64 is not below 64"),
        ("activation", {"invocation_tokens": [-1]}, "invocation token -1"),
        ("activation", {"invocation_tokens": [1.0]}, "activation.invocation_tokens.0"),
        ("activation", {"invocation_tokens": [1], "more": 1}, "canonical spelling"),
        ("more", 1, "canonical spelling"),
        ("chunks.0.more", 1, "canonical spelling"),
    ],
)
def test_a_manifest_that_is_wrong_is_corrupt(manifest: Manifest, path: str, new: Any, message: str) -> None:
    value = json.loads(manifest.to_bytes())
    edits(value, path, new)
    assert message in corruption(canonical_json(value))


def test_a_tensor_across_two_layers_is_corrupt(manifest: Manifest) -> None:
    value = json.loads(manifest.to_bytes())
    first, second = value["chunks"][1], value["chunks"][2]
    first["size"] -= 64
    second["offset"] -= 64
    second["size"] += 64
    assert "lies in chunks of layers 0 to 1" in corruption(canonical_json(value))


def test_a_manifest_that_is_not_servable_has_no_modules(manifest: Manifest) -> None:
    value = json.loads(manifest.to_bytes())
    value |= {"servable": False, "unservable_reason": "why"}
    assert "has modules" in corruption(canonical_json(value))


def test_a_manifest_that_is_not_servable_has_no_activation(folder: Any) -> None:
    folder.config["use_qalora"] = True
    value = json.loads(folder.fill().ingest().manifest.to_bytes())
    value["activation"] = {"invocation_tokens": [1]}
    assert "not servable has an activation" in corruption(canonical_json(value))


@pytest.mark.parametrize("key", ["schema", "name", "base", "chunks", "golden_probe"])
def test_a_missing_key_is_corrupt(manifest: Manifest, key: str) -> None:
    value = json.loads(manifest.to_bytes())
    del value[key]
    corruption(canonical_json(value))


def test_another_spelling_is_corrupt(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    value = json.loads(data)
    assert "canonical spelling" in corruption(json.dumps(value).encode())
    assert "canonical spelling" in corruption(data + b"\n")
    assert "canonical spelling" in corruption(data.replace(b'{"activation"', b'{"author":"","activation"', 1))
    assert "canonical spelling" in corruption(data.replace(b'"scale":2.0', b'"scale":2', 1))
    assert "canonical spelling" in corruption(data.replace(b'"scale":2.0', b'"scale":NaN', 1))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1)]
)
def test_bytes_that_are_no_manifest_are_corrupt(data: bytes) -> None:
    corruption(data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_is_corrupt_or_another_valid_manifest(manifest: Manifest, data: st.DataObject) -> None:
    original = manifest.to_bytes()
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Manifest.from_bytes(bytes(changed))
    except MeshError as error:
        assert error.reason is Reason.DATA_CORRUPT
    else:
        assert found.to_bytes() == bytes(changed)
        assert (found.digest == manifest.digest) == (bytes(changed) == original)


def test_reading_does_not_depend_on_the_callers_value(manifest: Manifest) -> None:
    assert copy.deepcopy(manifest) == manifest
