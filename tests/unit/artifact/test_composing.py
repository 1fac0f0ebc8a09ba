"""Compositions as one adapter, against the formulas computed member by member."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.artifact.canonical import tensor_view
from adaptermesh.artifact.composing import Member, compose, identity_of
from adaptermesh.artifact.manifest import BaseRef, Chunk, Cost, Manifest, ModuleOp, Source
from adaptermesh.artifact.safetensors_file import TensorSpec, lay_out
from adaptermesh.core.composition import (
    AVERAGE,
    STACK,
    Composition,
    Group,
    Leaf,
    composition_digest,
    parse_resolved,
)
from adaptermesh.core.digests import digest_bytes
from adaptermesh.core.errors import MeshError, Reason
from tests.unit.artifact.conftest import LLAMA, WEIGHTS_DIGEST

HIDDEN = 16
FACTS = BaseFacts.from_config("tiny", LLAMA, WEIGHTS_DIGEST)
Values = Mapping[str, npt.NDArray[np.float32]]


def make_member(modules: Sequence[tuple[str, int, str, float, Values, Any]], **changes: Any) -> Member:
    """modules: (site, layer, op, scale, tensors, options), layer by layer."""
    ops, specs, values = list[ModuleOp](), list[TensorSpec](), list[npt.NDArray[np.float32]]()
    for site, layer, op, scale, tensors, options in modules:
        names = {slot: f"L{layer}.{site}.{slot}" for slot in tensors}
        rank = len(tensors["A"]) if op == "lowrank" else 0
        ops.append(ModuleOp(site, layer, op, rank, scale, names, options=options))
        specs.extend(TensorSpec(names[slot], "F32", value.shape) for slot, value in tensors.items())
        values.extend(tensors.values())
    layout = lay_out(specs, {})
    data = np.zeros(layout.file_size, np.uint8)
    for entry, value in zip(layout.entries, values, strict=True):
        data[entry.offset : entry.offset + entry.size] = (
            np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        )
    fields: dict[str, Any] = {
        "namespace": "acme",
        "name": "x",
        "base": BaseRef.from_facts(FACTS),
        "source": Source("peft", {}, {}, ()),
        "kind": "lora",
        "size_bytes": layout.file_size,
        "modules": tuple(ops),
        "tensors": layout.entries,
        "chunks": (Chunk(0, layout.file_size, "sha256:" + "0" * 64, -1),),
        "cost": Cost(0, 0),
    }
    return Member(Manifest(**{**fields, **changes}), data.tobytes())


def digest_of(name: str) -> str:
    return digest_bytes(name.encode())


def random_member(kind: str, seed: int) -> Member:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape).astype(np.float32)

    rank = 1 + seed % 5
    low = {"A": normal(rank, HIDDEN), "B": normal(HIDDEN, rank)}
    beside = {
        "down": normal(rank, HIDDEN),
        "down_bias": normal(rank),
        "up": normal(HIDDEN, rank),
        "up_bias": normal(HIDDEN),
    }
    options = {"activation": "relu", "input": "residual" if kind == "parallel" else "sum"}
    shift = ("q", 1, "affine", 1.5, {"bias_delta": normal(HIDDEN)}, None)
    kinds: dict[str, list[tuple[str, int, str, float, Values, Any]]] = {
        "lora": [("q", 0, "lowrank", 2.0, low, None), ("q", 1, "lowrank", 0.5, low, None), shift],
        "ia3": [
            ("q", 1, "affine", 1.0, {"out_scale": normal(HIDDEN)}, None),
            ("q", 2, "affine", 1.0, {"in_scale": normal(HIDDEN)}, None),
        ],
        "parallel": [("ffn", 1, "bottleneck", 4.0, beside, options)],
        "serial": [("ffn", 1, "bottleneck", 1.0, beside, options)],
    }
    return make_member(kinds[kind])


def term(member: Member, layer: int, site: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What a member adds at one place to W x, W being one; x: [n, hidden]."""
    entries = {entry.name: entry for entry in member.manifest.tensors}
    found = np.zeros_like(x)
    for module in member.manifest.modules:
        if (module.layer, module.site) != (layer, site):
            continue
        v = {
            slot: tensor_view(entries[name], member.buffer).astype(np.float64)
            for slot, name in module.tensors.items()
        }
        if module.op == "lowrank":
            found += module.scale * (x @ v["A"].T @ v["B"].T)
        elif module.op == "bottleneck":
            inner = np.maximum(x @ v["down"].T + v["down_bias"], 0.0)
            found += module.scale * (inner @ v["up"].T + v["up_bias"])
        else:
            scale = v.get("in_scale", 1.0) * v.get("out_scale", 1.0)
            found += (scale - 1.0) * x + module.scale * v.get("bias_delta", 0.0)
    return found


def expected(
    tree: Composition, members: Mapping[str, Member], layer: int, site: str, x: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The sum of what the members add, with their weights."""
    if isinstance(tree, Leaf):
        return tree.weight * term(members[tree.name], layer, site, x)
    parts = [expected(member, members, layer, site, x) for member in tree.members]
    total = sum(member.weight for member in tree.members) if tree.kind == AVERAGE else 1.0
    found: npt.NDArray[np.float64] = tree.weight / total * np.sum(parts, axis=0)
    return found


def check(tree: Composition, members: Mapping[str, Member], places: Sequence[tuple[int, str]]) -> None:
    composed = compose(tree, members)
    data = composed.manifest.to_bytes()
    assert Manifest.from_bytes(data) == composed.manifest
    assert identity_of(composed.manifest, digest_bytes(data)) == composition_digest(tree)
    for chunk in composed.manifest.chunks:
        piece = composed.data[chunk.offset : chunk.offset + chunk.size].tobytes()
        assert digest_bytes(piece) == chunk.sha256
    found = Member(composed.manifest, composed.data.tobytes())
    x = np.random.default_rng(1).standard_normal((5, HIDDEN))
    for layer, site in places:
        np.testing.assert_allclose(
            term(found, layer, site, x), expected(tree, members, layer, site, x), rtol=1e-4, atol=1e-4
        )


names = [digest_of(str(number)) for number in range(4)]
weights = st.sampled_from([1.0, 0.5, 3.0, 0.125])
leaf = st.builds(Leaf, st.sampled_from(names), weights)
trees = st.recursive(
    leaf,
    lambda inner: st.builds(
        Group, st.sampled_from([STACK, AVERAGE]), st.lists(inner, min_size=1, max_size=3).map(tuple), weights
    ),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(trees, st.sampled_from(["lora", "parallel"]))
def test_what_adds_up_is_the_weighted_sum(tree: Composition, kind: str) -> None:
    members = {name: random_member(kind, seed) for seed, name in enumerate(names)}
    check(tree, members, [(0, "q"), (1, "q"), (1, "ffn")])


@settings(max_examples=40, deadline=None)
@given(st.lists(leaf, min_size=1, max_size=4), weights)
def test_factors_and_bottlenecks_have_exact_means(given_leaves: list[Leaf], weight: float) -> None:
    tree = Group(AVERAGE, tuple(given_leaves), weight)
    for kind in ("ia3", "serial"):
        members = {name: random_member(kind, seed) for seed, name in enumerate(names)}
        check(tree, members, [(1, "q"), (2, "q"), (1, "ffn")])


def test_factors_multiply_in_a_stack_and_scale_low_rank_parts() -> None:
    members = {
        names[0]: random_member("lora", 1),
        names[1]: random_member("ia3", 2),
        names[2]: random_member("ia3", 3),
    }
    tree = Group(STACK, tuple(Leaf(name) for name in names[:3]))
    composed = compose(tree, members)
    entries = {entry.name: entry for entry in composed.manifest.tensors}
    first, second = (
        {entry.name: tensor_view(entry, one.buffer) for entry in one.manifest.tensors}
        for one in (members[names[1]], members[names[2]])
    )
    found = tensor_view(entries["L1.q.out_scale"], composed.data.tobytes())
    np.testing.assert_allclose(found, first["L1.q.out_scale"] * second["L1.q.out_scale"], rtol=1e-6)
    assert [(module.site, module.layer, module.op) for module in composed.manifest.modules] == [
        ("q", 0, "lowrank"),
        ("q", 1, "lowrank"),
        ("q", 1, "affine"),
        ("q", 2, "affine"),
    ]


def dora() -> Member:
    low = {"A": np.ones((2, HIDDEN), np.float32), "B": np.ones((HIDDEN, 2), np.float32)}
    magnitude = {"magnitude": np.ones(HIDDEN, np.float32)}
    return make_member([("q", 1, "lowrank", 2.0, low, None), ("q", 1, "affine", 2.0, magnitude, None)])


REFUSED: dict[str, tuple[str, Sequence[Member], str]] = {
    "a weighted DoRA": ("0.5*{0}", [dora()], "can't be weighted"),
    "a DoRA beside another": ("stack({0},{1})", [dora(), random_member("lora", 1)], "magnitude"),
    "a mean with a DoRA": ("average({0},{1})", [dora(), random_member("lora", 1)], "magnitude"),
    "bottlenecks that read differently": (
        "average({0},{1})",
        [random_member("serial", 1), random_member("parallel", 2)],
        "read differently",
    ),
    "factors and low-rank parts": (
        "average({0},{1})",
        [random_member("ia3", 1), random_member("lora", 2)],
        "no exact mean",
    ),
    "another base": (
        "stack({0},{1})",
        [
            random_member("lora", 1),
            make_member(
                [("q", 1, "affine", 1.0, {"out_scale": np.ones(HIDDEN, np.float32)}, None)],
                base=BaseRef.from_facts(BaseFacts.from_config("other", LLAMA, "sha256:" + "6" * 64)),
            ),
        ],
        "base",
    ),
    "what can't be served": (
        "stack({0},{1})",
        [
            random_member("lora", 1),
            make_member([], servable=False, unservable_reason="it is of a kind that nobody knows"),
        ],
        "a kind that nobody knows",
    ),
    "virtual tokens": (
        "stack({0},{1})",
        [
            random_member("lora", 1),
            make_member([("embed", 0, "prompt", 1.0, {"E": np.ones((2, HIDDEN), np.float32)}, None)]),
        ],
        "virtual tokens",
    ),
    "a part of the tokens": (
        "2*{0}",
        [make_member([], activation={"invocation_tokens": [1]})],
        "served alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_composition_is_refused_in_words(case: str) -> None:
    text, given_members, why = REFUSED[case]
    members = dict(zip(names, given_members, strict=False))
    with pytest.raises(MeshError, match=why) as caught:
        compose(parse_resolved(text.format(*names)), members)
    assert caught.value.reason in (Reason.ADAPTER_UNSUPPORTED, Reason.BASE_MISMATCH)


def test_a_dora_alone_or_at_another_site_is_taken_as_it_is() -> None:
    other = make_member([("v", 1, "affine", 1.0, {"out_scale": np.full(HIDDEN, 2.0, np.float32)}, None)])
    members = {names[0]: dora(), names[1]: other}
    composed = compose(parse_resolved(f"stack({names[0]},0.5*{names[1]})"), members)
    assert Manifest.from_bytes(composed.manifest.to_bytes()) == composed.manifest
    assert [(module.site, module.op, module.scale) for module in composed.manifest.modules] == [
        ("q", "lowrank", 2.0),
        ("q", "affine", 2.0),
        ("v", "affine", 1.0),
    ]


def test_an_expression_that_is_none_is_no_identity() -> None:
    composed = compose(Leaf(names[0], 2.0), {names[0]: random_member("lora", 1)})
    assert identity_of(random_member("lora", 1).manifest, "sha256:x") == "sha256:x"
    broken = Manifest.from_bytes(composed.manifest.to_bytes().replace(b"2.0*sha256", b"2.0*sha999"))
    assert identity_of(broken, "sha256:x") == "sha256:x"


def test_a_composition_asks_of_the_base_what_its_members_do() -> None:
    heads = [{"lm_head": "sha256:" + letter * 64} for letter in "ab"]
    low = {"A": np.ones((2, HIDDEN), np.float32), "B": np.ones((HIDDEN, 2), np.float32)}
    parts = [("q", 0, "lowrank", 1.0, low, None)]
    given_members = [make_member(parts), *(make_member(parts, same_as_base=head) for head in heads)]
    members = dict(zip(names, given_members, strict=False))
    found = compose(parse_resolved("stack({},{})".format(*names)), members)
    assert found.manifest.same_as_base == heads[0]
    with pytest.raises(MeshError, match="bases with different weights of lm_head"):
        compose(parse_resolved("stack({},{},{})".format(*names)), members)


def test_what_acts_around_the_layers_adds_up_or_is_taken_as_it_is() -> None:
    random = np.random.default_rng(0)
    a, b, rows = (
        random.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (HIDDEN, 2), (3, HIDDEN))
    )
    end = make_member([("embed", 0, "lowrank", 2.0, {"A": a, "B": b}, None)])
    tokens = make_member([("embed", 0, "token_rows", 1.0, {"rows": rows}, None)])
    trained = tuple(replace(module, tokens=(5, 1, 7)) for module in tokens.manifest.modules)
    tokens = replace(tokens, manifest=replace(tokens.manifest, modules=trained))
    members = dict(zip(names, (end, end, tokens), strict=False))
    [module] = compose(parse_resolved("stack({},0.5*{})".format(*names)), members).manifest.modules
    assert (module.site, module.op, module.rank) == ("embed", "lowrank", 4)
    [alone] = compose(parse_resolved(f"stack({names[2]})"), members).manifest.modules
    assert (alone.op, alone.tokens) == ("token_rows", (5, 1, 7))
    with pytest.raises(MeshError, match="one of them with the op token_rows"):
        compose(parse_resolved("stack({0},{2})".format(*names)), members)
    with pytest.raises(MeshError, match="token_rows can't be weighted"):
        compose(parse_resolved(f"0.5*{names[2]}"), members)
