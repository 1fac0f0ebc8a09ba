"""Set-ups of the adapters library become one adapter; what is none is stored or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from adaptermesh.artifact import merging_members
from adaptermesh.artifact.canonical import open_buffer, tensors
from adaptermesh.artifact.composing import Member, compose
from adaptermesh.artifact.manifest import Manifest
from adaptermesh.artifact.sites import site_map
from adaptermesh.core.composition import parse_resolved
from adaptermesh.core.errors import MeshError, Reason
from tests.parity.adapters.goldens import ingest_folder, load_goldens

GOLDENS = load_goldens("llama")
Tree = dict[str, Any]


def single(name: str) -> Tree:
    return {"type": "single", "children": [name]}


def block(kind: str, *children: Tree, **kwargs: Any) -> Tree:
    return {"type": kind, "children": list(children), **({"kwargs": kwargs} if kwargs else {})}


XY = (single("x"), single("y"))
AB = (single("a"), single("b"))
LORAS = {"x": "lora", "y": "lora_everywhere"}
# The golden "fusion" is one of the adapters a and b, and is saved in a folder of this name.
FUSED = {"a": "seq_bn", "b": "seq_bn_by_layer", "a,b": "fusion"}


def write_setup(folder: Path, tree: Any, members: dict[str, str]) -> Path:
    """members: the golden that is each one's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    setup = {"adapter_setup": tree, "head_setup": None, "version": "adapters.1.3.0"}
    (folder / "adapter_setup.json").write_text(json.dumps(setup))
    for name, golden in members.items():
        shutil.copytree(GOLDENS.folder(golden), folder / name)
    return folder


def ingested(tmp_path: Path, tree: Any, members: dict[str, str]) -> Manifest:
    return ingest_folder(write_setup(tmp_path / "setup", tree, members), GOLDENS.facts, tmp_path / "out")


SERVED: dict[str, tuple[Tree, dict[str, str], str, str]] = {
    "a stack of LoRA": (block("Stack", *XY), LORAS, "stack({x},{y})", "stack"),
    "an average": (
        block("Average", *XY, weights=[0.75, 0.25]),
        LORAS,
        "average(0.75*{x},0.25*{y})",
        "average",
    ),
    "an average of bottlenecks": (
        block("Average", *XY),
        {"x": "seq_bn", "y": "seq_bn"},
        "average({x},{y})",
        "average",
    ),
    "one in another": (
        block("Stack", single("z"), block("Average", *XY)),
        {**LORAS, "z": "par_bn"},
        "stack({z},average({x},{y}))",
        "stack",
    ),
    "a LoRA and factors": (block("Stack", *XY), {"x": "lora", "y": "ia3"}, "stack({x},{y})", "stack"),
    "bottlenecks in a row": (
        block("Stack", *XY),
        {"x": "seq_bn", "y": "double_seq_bn"},
        "stack({x},{y})",
        "stack",
    ),
    "a fusion": (block("Fuse", *AB), FUSED, "fuse({a,b},{a},{b})", "fuse"),
    "a row that ends in a fusion": (
        block("Stack", single("z"), block("Fuse", *AB)),
        {**FUSED, "z": "double_seq_bn"},
        "stack({z},fuse({a,b},{a},{b}))",
        "stack",
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_setup_is_what_its_members_are_together(tmp_path: Path, case: str) -> None:
    tree, names, expression, kind = SERVED[case]
    manifest = ingested(tmp_path, tree, names)
    assert (manifest.servable, manifest.kind, manifest.unservable_reason) == (True, kind, "")
    assert manifest.composition is not None
    members, digests = {}, {}
    for name, golden in names.items():
        out = tmp_path / name
        one = ingest_folder(GOLDENS.folder(golden), GOLDENS.facts, out)
        members[one.digest] = Member(one, out.read_bytes())
        digests[name] = one.digest
    expected = compose(parse_resolved(expression.format(**digests)), members)
    assert manifest.modules == expected.manifest.modules
    with open_buffer(tmp_path / "out") as buffer:
        found = {entry.name: values.copy() for entry, values in tensors(manifest, buffer)}
    for entry, values in tensors(expected.manifest, expected.data.tobytes()):
        np.testing.assert_array_equal(found[entry.name], values)


@pytest.mark.parametrize(
    ("tree", "members", "why"),
    [
        (block("Fuse", single("a"), block("Stack", *XY)), {**LORAS, "a": "lora"}, "(Fuse over other blocks)"),
        (block("Average", block("Fuse", *AB), single("x")), {**FUSED, "x": "seq_bn"}, "have no mean"),
        (block("Fuse", *AB), {**FUSED, "b": "par_bn"}, "adds the residual stream twice"),
        (block("Fuse", *AB), {**FUSED, "b": "double_seq_bn"}, "that read differently"),
        (block("Fuse", *AB), {**FUSED, "b": "seq_bn_gated"}, "member 'b': not served"),
        (block("Parallel", *XY), LORAS, "a set-up (Parallel)"),
        (block("Average", *XY, weights=[1.5, -0.5]), LORAS, "not all above 0"),
        (block("Stack", *XY), {"x": "lora", "y": "seq_bn_gated"}, "member 'y': not served"),
        (block("Stack", *XY), {"x": "lora", "y": "dora"}, "a magnitude (DoRA)"),
    ],
)
def test_what_can_not_be_served_together_is_stored(
    tmp_path: Path, tree: Tree, members: dict[str, str], why: str
) -> None:
    manifest = ingested(tmp_path, tree, members)
    assert not manifest.servable
    assert why in manifest.unservable_reason


@pytest.mark.parametrize(
    ("tree", "members", "why"),
    [
        (block("Stack", single("x")), LORAS, "folder 'y' holds an adapter that the set-up does not name"),
        (block("Stack", single("x"), single("q")), LORAS, "member 'q' has no folder"),
        (block("Stack"), LORAS, "no tree"),
        (block("Stack", {"type": "single", "children": ["x", "y"]}), LORAS, "no tree"),
        (block("Average", *XY, weights=[1.0]), LORAS, "no tree"),
        (block("Stack", *[single("x")] * 17), {"x": "lora"}, "no tree"),
        (block("Stack", *[block("Stack", *[single("x")] * 9)] * 2), {"x": "lora"}, "no tree"),
        (block("Fuse", *AB), {"a": "seq_bn", "b": "seq_bn"}, r"has the 'fusion:a\+b', in this order"),
        (block("Fuse", *AB[::-1]), FUSED, r"has the 'fusion:b\+a', in this order"),
        (block("Fuse", *AB[::-1]), FUSED, "folder 'a,b' holds a fusion that the set-up does not name"),
        (block("Stack", *AB), FUSED, "folder 'a,b' holds a fusion that the set-up does not name"),
        (block("Fuse", *AB), {**FUSED, "more": "fusion"}, "folders 'a,b' and 'more' fuse the same adapters"),
        (block("Fuse", *AB), {"b": "seq_bn", "a,b": "fusion"}, "member 'a' has no folder"),
        (block("Fuse", single("a,b")), {"a,b": "fusion"}, "member 'a,b' has no folder"),
        ("Stack", LORAS, "has no type"),
        ({"type": 3}, LORAS, "has no type"),
    ],
)
def test_a_setup_that_is_none_is_refused(
    tmp_path: Path, tree: Any, members: dict[str, str], why: str
) -> None:
    with pytest.raises(MeshError, match=why) as caught:
        ingested(tmp_path, tree, members)
    assert caught.value.reason is Reason.ADAPTER_REJECTED


def test_a_member_without_its_tensors_or_with_others_is_refused(tmp_path: Path) -> None:
    folder = write_setup(tmp_path / "setup", block("Stack", *XY), LORAS)
    (folder / "y" / "adapter.safetensors").unlink()
    with pytest.raises(MeshError, match="member 'y' has no adapter"):
        ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
    folder = write_setup(tmp_path / "setup", block("Stack", *XY), LORAS)
    shutil.copy(GOLDENS.folder("par_bn") / "adapter.safetensors", folder / "y" / "adapter.safetensors")
    with pytest.raises(MeshError, match="asks for no such part"):
        ingest_folder(folder, GOLDENS.facts, tmp_path / "out")


def test_a_fusions_folder_is_read_with_every_check(tmp_path: Path) -> None:
    def changed(file: str, change: Any) -> MeshError:
        folder = write_setup(tmp_path / "setup", block("Fuse", *AB), FUSED)
        change(folder / "a,b" / file)
        with pytest.raises(MeshError) as caught:
            ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
        assert caught.value.reason is Reason.ADAPTER_REJECTED
        return caught.value

    def without_value(file: Path) -> None:
        file.write_text(file.read_text().replace('"value": true', '"value": false'))

    weights, config = "model_adapter_fusion.safetensors", "adapter_fusion_config.json"
    assert f"folder 'a,b' has no {weights}" in changed(weights, Path.unlink).message
    assert "is not valid" in changed(config, lambda file: file.write_text("{")).message
    assert "value.weight' is not expected" in changed(config, without_value).message
    shutil.copy(GOLDENS.folder("seq_bn") / "adapter.safetensors", tmp_path / "other")
    assert (
        "is of the adapter 'task_1'"
        in changed(weights, lambda file: shutil.copy(tmp_path / "other", file)).message
    )


def test_a_fusion_that_is_not_served_is_told_with_its_reason(tmp_path: Path) -> None:
    folder = write_setup(tmp_path / "setup", block("Fuse", *AB), FUSED)
    config = folder / "a,b" / "adapter_fusion_config.json"
    config.write_text(config.read_text().replace('"temperature": false', '"temperature": true'))
    manifest = ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
    assert "member 'fusion:a+b': not served yet: temperature" in manifest.unservable_reason


def test_a_fusion_of_one_shares_its_adapters_folder(tmp_path: Path) -> None:
    folder = write_setup(tmp_path / "setup", block("Fuse", single("a")), {"a": "seq_bn"})
    raw = json.loads((GOLDENS.folder("fusion") / "adapter_fusion_config.json").read_text())
    (folder / "a" / "adapter_fusion_config.json").write_text(
        json.dumps({**raw, "name": "a", "adapter_names": ["a"]})
    )
    found = load_file(GOLDENS.folder("fusion") / "model_adapter_fusion.safetensors")
    save_file(
        {name.replace("a,b", "a"): value for name, value in found.items()},
        folder / "a" / "model_adapter_fusion.safetensors",
    )
    manifest = ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
    assert (manifest.servable, manifest.op_kinds) == (True, ("bottleneck_group",))


names = st.sampled_from(["x", "y", "Stack", "Fuse"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=False) | names,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "children", "kwargs", "weights"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=json_values)
def test_any_tree_is_read_stored_or_refused(tmp_path: Path, tree: Any) -> None:
    try:
        manifest = ingested(tmp_path, tree, LORAS)
    except MeshError as error:
        assert error.reason is Reason.ADAPTER_REJECTED
    else:
        assert manifest.servable != bool(manifest.unservable_reason)


def test_a_setup_of_low_rank_adapters_may_be_merged_as_the_one_that_it_is(tmp_path: Path) -> None:
    manifest = ingested(tmp_path, block("Stack", *XY), LORAS)
    member = merging_members.Member("acme/both:v1", manifest.digest, manifest, tmp_path / "out")
    merging_members.check_members([member], GOLDENS.facts.digest, site_map(GOLDENS.facts))


def test_the_lm_heads_of_a_setup_are_one_head(tmp_path: Path) -> None:
    tree = block("Stack", *XY)
    folder = write_setup(tmp_path / "setup", tree, {"x": "with_lm_head", "y": "with_lm_head"})
    manifest = ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
    assert manifest.servable
    assert set(manifest.same_as_base) == {"lm_head"}
    head = folder / "y" / "model_head.safetensors"
    save_file({name: values + 1 for name, values in load_file(head).items()}, head)
    with pytest.raises(MeshError, match="member 'y' has another lm head than those before it"):
        ingest_folder(folder, GOLDENS.facts, tmp_path / "out")
