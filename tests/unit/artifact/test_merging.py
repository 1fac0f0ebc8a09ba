"""Adapters merged from their canonical files into a folder that ingest takes like any other."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.composing import Member as Composable
from adaptermesh.artifact.composing import compose
from adaptermesh.artifact.ingest import SourceBundle, ingest
from adaptermesh.artifact.manifest import Activation, Manifest
from adaptermesh.artifact.merging import MergeReport, merge
from adaptermesh.artifact.merging_members import Member
from adaptermesh.artifact.merging_recipe import MergeMethod, MergeRecipe, recipe_of
from adaptermesh.artifact.peft_methods import METHODS
from adaptermesh.core.composition import parse_resolved
from adaptermesh.core.errors import Code, MeshError, Reason
from tests.unit.artifact.conftest import PeftFolder
from tests.unit.artifact.test_golden_digests import KINDS, Q

Deltas = dict[tuple[str, int], npt.NDArray[np.float64]]
GOLDEN_WEIGHTS = "6ff9d2432c24c881b3ff614a5fb12afb7b525a147ee3aaad5a97bdc003d3cbce"

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "hidden_size": ...,
    "num_hidden_layers": ...,
}
PHI3 = {"architectures": ["Phi3ForCausalLM"]}


def deltas(manifest: Manifest, path: Path) -> Deltas:
    entries = {entry.name: entry for entry in manifest.tensors}
    found: Deltas = {}
    with path.open("rb") as file:
        for op in manifest.modules:
            a, b = (
                tensor_from_file(entries[op.tensors[slot]], file).astype(np.float64) for slot in ("A", "B")
            )
            found[op.site, op.layer] = op.scale * (b @ a)
    return found


class Kit:
    """Makes members and merges them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.members: list[Member] = []

    def member(self, base: BaseFacts, dtype: str = "F32", seed: int = 0, **config: Any) -> Member:
        name = f"member-{len(self.members)}"
        folder = PeftFolder(self.root / name, base)
        folder.config |= config
        folder.bundle["name"] = name
        folder.fill(dtype, seed)
        return self.add(name, folder)

    def add(self, name: str, folder: PeftFolder) -> Member:
        manifest = folder.ingest().manifest
        self.members.append(Member(f"acme/{name}:v1", manifest.digest, manifest, folder.out_file))
        return self.members[-1]

    def recipe(self, method: str, weights: tuple[float, ...], **numbers: Any) -> MergeRecipe:
        members = zip((member.digest for member in self.members), weights, strict=True)
        return recipe_of(MergeMethod(method), members, **numbers)

    def merge(self, base: BaseFacts, recipe: MergeRecipe) -> tuple[MergeReport, Manifest, Deltas]:
        folder = self.root / "merged"
        report = merge(self.members, recipe, base, folder)
        files = {path.name: path for path in folder.iterdir()}
        bundle = SourceBundle(files, "acme", "merged", license="MIT")
        result = ingest(bundle, base, self.root / "merged.canonical")
        assert result.warnings == ()
        assert result.manifest.servable
        return report, result.manifest, deltas(result.manifest, self.root / "merged.canonical")

    def expected(self, weights: tuple[float, ...]) -> Deltas:
        total: Deltas = {}
        for member, weight in zip(self.members, weights, strict=True):
            for place, delta in deltas(member.manifest, member.tensors).items():
                total[place] = total.get(place, 0) + weight * delta
        return total


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def check_equal(found: Deltas, expected: Deltas, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        scale = max(1.0, float(np.abs(delta).max()))
        np.testing.assert_allclose(found[place], delta, atol=tolerance * scale, rtol=0, err_msg=str(place))


def test_linear_is_the_weighted_sum_for_members_of_other_ranks_scales_dtypes_and_sites(
    kit: Kit, base: BaseFacts
) -> None:
    kit.member(base, "F32", 1)
    kit.member(base, "BF16", 2, r=3, lora_alpha=7, target_modules=["v_proj", "down_proj"])
    kit.member(base, "F16", 3, r=2, rank_pattern={"layers.1.self_attn.q_proj": 5}, use_rslora=True)
    weights = (1.0, -0.75, 2.5)
    report, manifest, found = kit.merge(base, kit.recipe("linear", weights))
    check_equal(found, kit.expected(weights))
    assert {op.scale for op in manifest.modules} == {1.0}
    assert {(op.site, op.layer): op.rank for op in manifest.modules if op.layer < 2} == {
        ("q", 0): 6,
        ("v", 0): 9,
        ("down", 0): 3,
        ("q", 1): 9,
        ("v", 1): 9,
        ("down", 1): 3,
    }
    assert report == MergeReport(9, 9, 1.0, 1.0, report.least_kept_module)


def test_an_average_divides_by_the_sum_of_the_weights_once(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, seed=1)
    kit.member(base, seed=2, target_modules=["q_proj"])
    _, _, found = kit.merge(base, kit.recipe("average", (1.0, 3.0)))
    check_equal(found, kit.expected((0.25, 0.75)))


def test_the_average_of_one_is_itself(kit: Kit, base: BaseFacts) -> None:
    member = kit.member(base, "BF16", 1)
    _, manifest, found = kit.merge(base, kit.recipe("average", (0.3,)))
    assert manifest.max_rank == member.manifest.max_rank
    for place, delta in deltas(member.manifest, member.tensors).items():
        np.testing.assert_array_equal(found[place], delta)


@pytest.mark.parametrize(
    ("changes", "modules"),
    [(GPT2, ["c_attn", "attn.c_proj"]), (PHI3, ["qkv_proj", "gate_up_proj", "o_proj"])],
    ids=["gpt2", "phi3"],
)
def test_a_fused_module_is_put_together_again_without_more_rank_than_its_members_have(
    kit: Kit, make_base: Callable[..., BaseFacts], changes: dict[str, Any], modules: list[str]
) -> None:
    base = make_base(**changes)
    kit.member(base, seed=1, target_modules=modules)
    kit.member(base, seed=2, target_modules=modules[:1], r=3)
    _, manifest, found = kit.merge(base, kit.recipe("linear", (1.0, 0.5)))
    check_equal(found, kit.expected((1.0, 0.5)))
    assert manifest.max_rank == 7
    assert manifest.source.config["fan_in_fan_out"] is (changes is GPT2)
    _, _, cut = kit.merge(base, kit.recipe("svd", (1.0, 0.5), rank=7))
    check_equal(cut, found, 1e-5)


def test_sites_of_a_fused_module_with_an_a_of_their_own_keep_it(
    kit: Kit, make_base: Callable[..., BaseFacts]
) -> None:
    base = make_base(**GPT2)
    member = kit.member(base, seed=1, target_modules=["c_attn"])
    entry = next(entry for entry in member.manifest.tensors if entry.name == "L0.k.A")
    with member.tensors.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.random.default_rng(9).standard_normal(entry.shape).astype("<f4").tobytes())
    _, manifest, found = kit.merge(base, kit.recipe("linear", (1.0,)))
    check_equal(found, kit.expected((1.0,)))
    assert {(op.layer, op.rank) for op in manifest.modules} == {(0, 8), (1, 4)}


@pytest.mark.parametrize(
    ("method", "expression"), [("linear", "stack(0.75*{},-0.5*{})"), ("average", "average(3*{},{})")]
)
def test_a_merge_computes_what_a_composition_of_the_same_members_does(
    kit: Kit, base: BaseFacts, method: str, expression: str
) -> None:
    kit.member(base, seed=1)
    kit.member(base, "BF16", seed=2, r=3, target_modules=["v_proj", "down_proj"])
    weights = (0.75, -0.5) if method == "linear" else (3.0, 1.0)
    composition = parse_resolved(expression.format(*(member.digest for member in kit.members)))
    composed = compose(
        composition,
        {one.digest: Composable(one.manifest, one.tensors.read_bytes()) for one in kit.members},
    )
    (kit.root / "composed").write_bytes(composed.data.tobytes())
    _, _, found = kit.merge(base, kit.recipe(method, weights))
    check_equal(found, deltas(composed.manifest, kit.root / "composed"))


@pytest.mark.parametrize("kind", ["adalora", "loha", "vera"])
def test_what_is_exactly_a_lora_is_merged_with_one(kit: Kit, base: BaseFacts, kind: str) -> None:
    method, changes, tensors, shared = KINDS[kind]
    folder = PeftFolder(kit.root / kind, base)
    folder.config = {**METHODS[method].defaults, "target_modules": ["q_proj"], "peft_type": method, **changes}
    folder.tensors |= {f"base_model.{name}": ("F32", values) for name, values in shared.items()}
    for layer in range(3):
        for name, values in tensors(Q).items():
            folder.tensors[f"base_model.model.model.layers.{layer}.{Q}.{name}"] = ("F32", values)
    kit.add(kind, folder)
    kit.member(base, seed=1)
    _, _, found = kit.merge(base, kit.recipe("linear", (0.5, 2.0)))
    check_equal(found, kit.expected((0.5, 2.0)))


def test_svd_cuts_each_module_to_the_rank_and_says_what_is_left(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, seed=1)
    kit.member(base, seed=2, r=2, target_modules=["v_proj", "down_proj"])
    weights = (1.0, -1.0)
    report, manifest, found = kit.merge(base, kit.recipe("svd", weights, rank=3))
    kept = total = 0.0
    shares = []
    for place, delta in kit.expected(weights).items():
        values = np.square(np.linalg.svd(delta, compute_uv=False))
        kept, total = kept + values[:3].sum(), total + values.sum()
        shares.append(values[:3].sum() / values.sum())
        lost = np.square(found[place] - delta).sum()
        assert lost == pytest.approx(values[3:].sum(), abs=1e-4 * values.sum())
    assert report.kept == pytest.approx(kept / total, rel=1e-5)
    assert report.least_kept == pytest.approx(min(shares), rel=1e-5)
    assert report.least_kept_module.startswith("model.layers.")
    # The rank of a sum is at most the sum of the ranks.
    assert {op.site: op.rank for op in manifest.modules} == {"q": 3, "v": 3, "down": 2}


@pytest.mark.parametrize(
    ("method", "numbers"), [("ties", {"density": 0.4}), ("dare", {"density": 0.5, "seed": 11})]
)
def test_a_dense_method_is_the_same_again_and_complete_at_full_rank(
    kit: Kit, base: BaseFacts, method: str, numbers: dict[str, Any]
) -> None:
    kit.member(base, seed=1)
    kit.member(base, seed=2, r=2, target_modules=["v_proj"])
    recipe = kit.recipe(method, (1.0, 0.5), rank=64, **numbers)
    report, manifest, found = kit.merge(base, recipe)
    assert report.kept == pytest.approx(1.0)
    assert {op.site: op.rank for op in manifest.modules} == {"q": 16, "v": 8}
    again = kit.merge(base, recipe)
    assert again[1].digest == manifest.digest
    if method == "ties":
        # Alone, a delta is only trimmed.
        delta = kit.expected((1.0, 0.0))["q", 0]
        least = np.sort(np.abs(delta).ravel())[-int(0.4 * delta.size)]
        np.testing.assert_allclose(found["q", 0], np.where(np.abs(delta) >= least, delta, 0), atol=1e-4)
    else:
        # What is kept is twice as large, the rest is gone.
        delta, q = kit.expected((1.0, 0.0))["q", 0], found["q", 0]
        kept = np.abs(q) > 1e-4
        np.testing.assert_allclose(q[kept], 2 * delta[kept], atol=1e-3)
        assert 0.35 < kept.mean() < 0.65


def test_dare_with_everything_kept_is_the_linear_sum(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, seed=1)
    kit.member(base, seed=2)
    _, _, found = kit.merge(base, kit.recipe("dare", (1.0, 0.5), rank=64, density=1.0, seed=0))
    check_equal(found, kit.expected((1.0, 0.5)), 1e-5)


def test_the_bytes_of_a_merged_file_are_the_same_everywhere(kit: Kit, base: BaseFacts) -> None:
    for number in range(2):
        folder = PeftFolder(kit.root / str(number), base)
        for layer in range(3):
            for module, out in (("q_proj", 16), ("v_proj", 8)):
                path = f"model.layers.{layer}.self_attn.{module}"
                values = np.arange(out * 4, dtype=np.float32).reshape(out, 4) - layer
                folder.put(path, "A", np.arange(64, dtype=np.float32).reshape(4, 16) / np.float32(3) + number)
                folder.put(path, "B", values / np.float32(7))
        kit.add(f"member-{number}", folder)
    kit.merge(base, kit.recipe("linear", (0.1, -0.7)))
    weights = kit.root / "merged" / "adapter_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == GOLDEN_WEIGHTS


def test_the_folder_is_that_of_a_plain_lora_and_says_what_was_merged(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, seed=1)
    kit.member(base, seed=2, r=2, target_modules=["v_proj"])
    kit.merge(base, kit.recipe("svd", (1.0, -0.5), rank=3))
    folder = kit.root / "merged"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.digest
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"
    card = (folder / "README.md").read_text()
    assert "svd, rank 3" in card
    assert f"| acme/member-1 | -0.5 | `{kit.members[1].digest}` |" in card


def test_the_progress_counts_modules(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, seed=1)
    seen: list[tuple[int, int]] = []
    merge(
        kit.members,
        kit.recipe("linear", (1.0,)),
        base,
        kit.root / "merged",
        lambda done, of: seen.append((done, of)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]


def refusal(kit: Kit, base: BaseFacts, reason: Reason) -> str:
    recipe = kit.recipe("linear", (1.0,) * len(kit.members))
    with pytest.raises(MeshError) as caught:
        merge(kit.members, recipe, base, kit.root / "merged")
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, reason)
    return caught.value.message


@pytest.mark.parametrize(
    ("config", "ends", "slot"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", "magnitude"),
        ({"lora_bias": True}, "lora_B.bias", "bias_delta"),
    ],
)
def test_a_member_with_another_op_is_refused_and_the_op_is_named(
    kit: Kit, base: BaseFacts, config: dict[str, Any], ends: str, slot: str
) -> None:
    folder = PeftFolder(kit.root / "a", base)
    folder.config |= {"target_modules": ["q_proj"], **config}
    folder.fill()
    for name in [name for name in folder.tensors if name.endswith("lora_B.weight")]:
        folder.tensors[name.replace("lora_B.weight", ends)] = ("F32", np.ones(16, np.float32))
    kit.add("a", folder)
    message = refusal(kit, base, Reason.ADAPTER_UNSUPPORTED)
    assert f"'acme/a:v1' can't be merged: it has the op 'affine' ({slot}) at layer 0, site 'q'" in message


def test_an_ia3_is_refused(kit: Kit, base: BaseFacts) -> None:
    folder = PeftFolder(kit.root / "a", base)
    folder.config = {**METHODS["IA3"].defaults, "target_modules": ["q_proj"]}
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.ia3_l"
        folder.tensors[name] = ("F32", np.ones((16, 1), np.float32))
    kit.add("a", folder)
    assert "'affine' (out_scale)" in refusal(kit, base, Reason.ADAPTER_UNSUPPORTED)


def test_what_can_not_be_served_is_refused_with_that_reason(kit: Kit, base: BaseFacts) -> None:
    kit.member(base, use_qalora=True)
    assert "can't be served either: not served yet: QALoRA" in refusal(kit, base, Reason.ADAPTER_UNSUPPORTED)


def test_a_member_with_something_beside_its_weights_is_refused(kit: Kit, base: BaseFacts) -> None:
    member = kit.member(base)
    manifest = dataclasses.replace(member.manifest, activation=Activation((1,)))
    kit.members = [dataclasses.replace(member, manifest=manifest)]
    assert "activation" in refusal(kit, base, Reason.ADAPTER_UNSUPPORTED)


def test_a_member_of_another_base_is_refused_with_both_digests(
    kit: Kit, base: BaseFacts, make_base: Callable[..., BaseFacts]
) -> None:
    kit.member(base, seed=1)
    other = make_base(vocab_size=65)
    kit.member(other, seed=2)
    message = refusal(kit, base, Reason.BASE_MISMATCH)
    assert "acme/member-1:v1" in message
    assert base.digest in message
    assert other.digest in message


def test_ranks_that_add_up_to_more_than_a_lora_may_have_are_refused(
    kit: Kit, base: BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermesh.artifact.merging.MAX_RANK", 7)
    kit.member(base, seed=1)
    kit.member(base, seed=2)
    with pytest.raises(MeshError, match=r"add up to 8 at .*: use svd with a rank"):
        merge(kit.members, kit.recipe("linear", (1.0, 1.0)), base, kit.root / "merged")
    merge(kit.members, kit.recipe("svd", (1.0, 1.0), rank=8), base, kit.root / "merged")
