"""Bottlenecks one after the other, side by side and fused, against the formulas computed member by member."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact import composing
from adaptermesh.artifact.canonical import tensor_view
from adaptermesh.artifact.composing import Member, Opened, compose, compose_modules
from adaptermesh.artifact.manifest import Manifest, ModuleOp
from adaptermesh.artifact.plan import Floats
from adaptermesh.core.composition import AVERAGE, FUSE, STACK, Composition, Group, Leaf, parse_resolved
from adaptermesh.core.errors import MeshError, Reason
from tests.unit.artifact.test_composing import HIDDEN, digest_of, make_member

Doubles = npt.NDArray[np.float64]
KINDS = [("relu", "sum"), ("tanh", "sum"), ("relu", "residual"), ("linear", "output")]
ACTIVATIONS: dict[str, Callable[[Doubles], Doubles]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "linear": lambda x: x,
}
NAMES = [digest_of(str(number)) for number in range(6)]
FUSION = digest_of("fusion")


def normal(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return (0.3 * random.standard_normal(shape)).astype(np.float32)


def bottleneck(seed: int, activation: str = "relu", source: str = "sum", layer: int = 1) -> Any:
    random = np.random.default_rng(seed)
    width = 1 + seed % 5
    shapes = {"down": (width, HIDDEN), "down_bias": (width,), "up": (HIDDEN, width), "up_bias": (HIDDEN,)}
    values = {slot: normal(random, *shape) for slot, shape in shapes.items()}
    options = {"activation": activation, "input": source}
    return "ffn", layer, "bottleneck", 0.5 + seed, values, options


def adapter(seed: int, activation: str = "relu", source: str = "sum") -> Member:
    """Every second one acts in layer 0 too."""
    layers = (0, 1) if seed % 2 else (1,)
    return make_member([bottleneck(seed, activation, source, layer) for layer in layers])


def fusion(
    members: int, *, value: bool = True, query: str = "input", layers: Sequence[int] = (0, 1)
) -> Member:
    random = np.random.default_rng(99)
    modules: list[Any] = []
    for layer in layers:
        tensors = {slot: normal(random, HIDDEN, HIDDEN) for slot in ("query", "key")}
        tensors |= {slot: normal(random, HIDDEN) for slot in ("query_bias", "key_bias")}
        tensors |= {"value": normal(random, HIDDEN, HIDDEN)} if value else {}
        modules.append(("ffn", layer, "fusion", 1.0, tensors, {"members": str(members), "query": query}))
    return make_member(
        modules, servable=False, unservable_reason="ask for fuse", op_kinds=("fusion",), kind="fusion"
    )


def tensors_of(member: Member, module: ModuleOp) -> dict[str, Doubles]:
    entries = {entry.name: entry for entry in member.manifest.tensors}
    return {
        slot: tensor_view(entries[name], member.buffer).astype(np.float64)
        for slot, name in module.tensors.items()
    }


def own_term(member: Member, module: ModuleOp, r: Doubles, h: Doubles) -> Doubles:
    options, v = module.options or {}, tensors_of(member, module)
    x = {"sum": r + h, "residual": r, "output": h}[options["input"]]
    inner = ACTIVATIONS[options["activation"]](x @ v["down"].T + v["down_bias"])
    found: Doubles = module.scale * (inner @ v["up"].T + v["up_bias"])
    return found


def weighed(fusing: Mapping[str, Doubles], x: Doubles, ups: Sequence[Doubles]) -> Doubles:
    query = x @ fusing["query"].T + fusing["query_bias"]
    scores = np.stack([(query * (up @ fusing["key"].T + fusing["key_bias"])).sum(1) for up in ups])
    shares = np.exp(scores - scores.max(0))
    shares /= shares.sum(0)
    value = fusing.get("value", np.eye(HIDDEN))
    found: Doubles = np.sum([s[:, None] * (up @ value.T) for s, up in zip(shares, ups, strict=True)], axis=0)
    return found


def modules_at(member: Member, layer: int) -> list[ModuleOp]:
    return [module for module in member.manifest.modules if (module.layer, module.site) == (layer, "ffn")]


def expected(tree: Composition, members: Mapping[str, Member], layer: int, r: Doubles, h: Doubles) -> Doubles:
    """What a tree of adapters with one bottleneck each adds."""
    if isinstance(tree, Leaf):
        terms = [own_term(members[tree.name], one, r, h) for one in modules_at(members[tree.name], layer)]
        return tree.weight * sum(terms, np.zeros_like(h))
    if tree.kind == FUSE:
        first, *rest = tree.members
        assert isinstance(first, Leaf)
        present = [one for one in rest if isinstance(one, Leaf) and modules_at(members[one.name], layer)]
        if not present:
            return np.zeros_like(h)
        ups = [expected(one, members, layer, r, h) for one in present]
        source = (modules_at(members[present[0].name], layer)[0].options or {})["input"]
        fusing = tensors_of(members[first.name], modules_at(members[first.name], layer)[0])
        return tree.weight * weighed(fusing, r + h if source == "sum" else h, ups)
    total = sum(member.weight for member in tree.members)
    added = np.zeros_like(h)
    for member in tree.members:
        if tree.kind == STACK:
            added = added + expected(member, members, layer, r, h + added)
        else:
            added = added + expected(member, members, layer, r, h) / total
    return tree.weight * added


def found_term(member: Member, layer: int, r: Doubles, h: Doubles) -> Doubles:
    """What the modules of a composed adapter add, as the op table says."""
    added, modules = np.zeros_like(h), modules_at(member, layer)
    while modules:
        first = modules.pop(0)
        step = [first]
        while modules and (modules[0].options or {}).get("step") == "same":
            step.append(modules.pop(0))
        ups = [own_term(member, one, r, h + added) for one in step]
        x = r + h + added if (first.options or {})["input"] == "sum" else h + added
        fusing = tensors_of(member, first)
        added = added + (weighed(fusing, x, ups) if "query" in fusing else ups[0])
    return added


def check(tree: Composition, members: Mapping[str, Member]) -> Manifest:
    composed = compose(tree, members)
    assert Manifest.from_bytes(composed.manifest.to_bytes()) == composed.manifest
    found = Member(composed.manifest, composed.data.tobytes())
    r, h = np.random.default_rng(1).standard_normal((2, 5, HIDDEN))
    for layer in (0, 1):
        np.testing.assert_allclose(
            found_term(found, layer, r, h), expected(tree, members, layer, r, h), rtol=1e-4, atol=1e-4
        )
    # What was composed can be composed again.
    again = compose(parse_resolved(f"stack({FUSION})"), {FUSION: found})
    np.testing.assert_allclose(
        found_term(Member(again.manifest, again.data.tobytes()), 1, r, h),
        found_term(found, 1, r, h),
        rtol=1e-6,
        atol=1e-6,
    )
    return composed.manifest


weights = st.sampled_from([1.0, 0.5, 3.0, -0.25])
leaf = st.builds(Leaf, st.sampled_from(NAMES), weights)
stacks = st.recursive(
    leaf,
    lambda inner: st.builds(Group, st.just(STACK), st.lists(inner, min_size=1, max_size=3).map(tuple)),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(stacks, st.lists(st.sampled_from(KINDS), min_size=6, max_size=6))
def test_in_a_stack_each_reads_what_those_before_have_added(
    tree: Composition, kinds: list[tuple[str, str]]
) -> None:
    members = {name: adapter(seed, *kind) for seed, (name, kind) in enumerate(zip(NAMES, kinds, strict=True))}
    check(tree, members)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([1.0, 0.5, -2.0]),
    st.sampled_from(["sum", "output"]),
    st.none() | st.sampled_from(NAMES),
)
def test_a_fusion_weighs_those_that_are_present_and_stands_in_stacks(
    names: list[str], value: bool, weight: float, source: str, before: str | None
) -> None:
    members = {name: adapter(seed, "tanh", source) for seed, name in enumerate(NAMES)}
    members[FUSION] = fusion(len(names), value=value, query="output" if source == "output" else "input")
    tree: Composition = Group(FUSE, (Leaf(FUSION), *map(Leaf, names)), weight)
    if before is not None:
        tree = Group(STACK, (Leaf(before), tree, Leaf(NAMES[0], 0.5)))
    check(tree, members)


def test_what_was_one_bottleneck_stays_one() -> None:
    parallel = {name: adapter(seed, "relu", "residual") for seed, name in enumerate(NAMES)}
    for text in ("stack({1},{3})", "average({1},{3})", "stack(average({1},{3}),2*{5})", "0.5*stack({1},{3})"):
        manifest = check(parse_resolved(text.format(*NAMES)), parallel)
        assert [(one.op, one.member) for one in manifest.modules] == [("bottleneck", 0)] * 2
    serial = {name: adapter(seed) for seed, name in enumerate(NAMES)}
    manifest = check(parse_resolved(f"average({NAMES[1]},{NAMES[3]})"), serial)
    assert manifest.op_kinds == ("bottleneck",)
    assert b'"member"' not in manifest.to_bytes()


def test_a_group_is_written_member_by_member_in_the_order_of_the_stack() -> None:
    members = {name: adapter(seed, *KINDS[seed % 2]) for seed, name in enumerate(NAMES)}
    members[FUSION] = fusion(2)
    tree = parse_resolved(f"stack({NAMES[1]},fuse({FUSION},{NAMES[2]},{NAMES[3]}))")
    manifest = check(tree, members)
    assert [(one.layer, one.op, one.member, (one.options or {})["step"]) for one in manifest.modules] == [
        (0, "bottleneck_group", 0, "next"),
        (0, "bottleneck_group", 1, "next"),
        (1, "bottleneck_group", 0, "next"),
        (1, "bottleneck_group", 1, "next"),
        (1, "bottleneck_group", 2, "same"),
    ]
    assert manifest.modules[1].tensors["query"] == "L0.ffn.1.query"
    assert "query" not in manifest.modules[4].tensors
    assert {one.scale for one in manifest.modules} == {1.0}


def extra(seed: int, other: Any) -> Member:
    return make_member([bottleneck(seed), other])


LOW = {"A": np.ones((2, HIDDEN), np.float32), "B": np.ones((HIDDEN, 2), np.float32)}
SHIFT = {"bias_delta": np.ones(HIDDEN, np.float32)}
SERIAL = [adapter(1), adapter(3), adapter(5)]
REFUSED: dict[str, tuple[str, list[Member], str]] = {
    "a weighted row": ("0.5*stack({0},{1})", SERIAL, "give each of them a weight of its own"),
    "a mean with a row": ("average(stack({0},{1}),{2})", SERIAL, "have no weight or share together"),
    "a mean with rows whole": (
        "average(stack({0},{1}),{2})",
        [adapter(1, "relu", "residual"), adapter(3, "tanh", "residual"), adapter(5, "relu", "residual")],
        "have no mean with others: stack them",
    ),
    "a mean with what is fused": (
        "average(fuse({3},{0},{1}),{2})",
        [*SERIAL, fusion(2)],
        "have no mean with others: stack them",
    ),
    "a mean of other activations": (
        "average({0},{1})",
        [adapter(1), adapter(3, "tanh")],
        "other activations",
    ),
    "fused of parallel ones": (
        "fuse({2},{0},{1})",
        [adapter(1, "relu", "residual"), adapter(3, "relu", "residual"), fusion(2)],
        "adds the residual stream twice",
    ),
    "fused of other inputs": (
        "fuse({2},{0},{1})",
        [adapter(1), adapter(3, "relu", "output"), fusion(2)],
        "read differently",
    ),
    "another query": ("fuse({1},{0})", [adapter(1), fusion(1, query="output")], "query_before_ln=False"),
    "another number": ("fuse({1},{0})", [adapter(1), fusion(2)], "trained on 2 adapters, the fuse names 1"),
    "no fusion": ("fuse({0},{1})", SERIAL, "is no fusion"),
    "a fusion alone": ("2*{0}", [fusion(2)], "ask for fuse"),
    "a fusion in a fuse": ("fuse({1},{1},{0})", [adapter(1), fusion(2)], "only first in a fuse"),
    "where the fusion has nothing": (
        "fuse({1},{0})",
        [adapter(1), fusion(1, layers=(1,))],
        "acts at layer 0 'ffn', where its fusion has nothing",
    ),
    "a LoRA": (
        "fuse({1},{0})",
        [extra(2, ("q", 1, "lowrank", 1.0, LOW, None)), fusion(1)],
        "acts at layer 1 'q', where its fusion has nothing",
    ),
    "more than a bottleneck": (
        "fuse({1},{0})",
        [extra(2, ("ffn", 1, "affine", 1.0, SHIFT, None)), fusion(1)],
        "weighs bottlenecks alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused_in_words(case: str) -> None:
    text, given_members, why = REFUSED[case]
    members = dict(zip(NAMES, given_members, strict=False))
    with pytest.raises(MeshError, match=why) as caught:
        compose(parse_resolved(text.format(*NAMES)), members)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


def test_a_fusion_does_not_weigh_what_has_several_itself() -> None:
    serial = dict(zip(NAMES, SERIAL, strict=False))
    both = compose(parse_resolved(f"stack({NAMES[0]},{NAMES[1]})"), serial)
    members = {NAMES[0]: Member(both.manifest, both.data.tobytes()), FUSION: fusion(1)}
    with pytest.raises(MeshError, match="has several at one place"):
        compose(parse_resolved(f"fuse({FUSION},{NAMES[0]})"), members)


def test_what_reads_the_residual_has_a_weight_in_a_row_too() -> None:
    members = {NAMES[0]: adapter(1), NAMES[1]: adapter(3, "tanh", "residual")}
    check(Group(STACK, (Leaf(NAMES[0]), Leaf(NAMES[1])), 0.5), members)
    check(Group(AVERAGE, (Group(STACK, (Leaf(NAMES[0]), Leaf(NAMES[1])), 0.5),), 3.0), members)


def test_what_would_be_too_large_is_not_made_first(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {NAMES[0]: adapter(1), NAMES[1]: adapter(3), FUSION: fusion(2)}
    tree = parse_resolved(f"fuse({FUSION},{NAMES[0]},{NAMES[1]})")
    monkeypatch.setattr(composing, "MAX_COMPOSED_BYTES", 1000)
    read = list[str]()

    def opened(name: str) -> Opened:
        whole = {one.name: one for one in members[name].manifest.tensors}

        def values(tensor: str) -> Floats:
            read.append(tensor)
            found: Floats = tensor_view(whole[tensor], members[name].buffer)
            return found

        return Opened(members[name].manifest.modules, values)

    with pytest.raises(MeshError, match="more than 1000 bytes") as caught:
        compose_modules(tree, {name: opened(name) for name in members})
    assert caught.value.reason is Reason.OVERLOADED
    assert all(name.startswith("L0.") for name in read)
