"""Groups of bottlenecks against the formula written out, in slots that come and go."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.ops import ACTIVATIONS, BOTTLENECK_INPUTS
from adaptermesh.artifact.sites import BLOCKS
from adaptermesh.worker.engine.ops import bottleneck
from adaptermesh.worker.engine.ops.bottleneck_group import BottleneckGroup
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import load

LAYERS, HIDDEN = 2, 12


activations = st.sampled_from(sorted(ACTIVATIONS))
members = st.lists(st.tuples(st.integers(1, 9), activations), min_size=1, max_size=3)
fused = st.tuples(
    st.sampled_from(["sum", "output"]), members, st.sampled_from(["static", "dynamic"]), st.booleans()
)
alone = st.tuples(
    st.sampled_from(sorted(BOTTLENECK_INPUTS)),
    st.tuples(st.tuples(st.integers(1, 9), activations)),
    st.just(""),
    st.just(False),
)
groups = st.dictionaries(
    st.tuples(st.sampled_from(BLOCKS), st.integers(0, LAYERS - 1)),
    st.lists(alone | fused, min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
segments = st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 5)), min_size=1, max_size=5)
Groups = dict[tuple[str, int], list[tuple[str, Sequence[tuple[int, str]], str, bool]]]
"""By place its steps: input, width and activation of each, what is fused, and whether that has biases."""


def make_modules(chosen: Groups, seed: int) -> tuple[list[ModuleOp], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    modules, tensors = list[ModuleOp](), dict[str, torch.Tensor]()
    for (site, layer), steps in chosen.items():
        number = 0
        for source, parts, fusing, biased in steps:
            for place, (width, activation) in enumerate(parts):
                shapes: dict[str, tuple[int, ...]] = {"down": (width, HIDDEN), "down_bias": (width,)}
                shapes |= {"up": (HIDDEN, width), "up_bias": (HIDDEN,)}
                if fusing and not place:
                    shapes |= dict.fromkeys(("query", "key"), (HIDDEN, HIDDEN))
                    shapes |= {"value": (HIDDEN, HIDDEN)} if fusing == "dynamic" else {}
                    shapes |= {f"{slot}_bias": (HIDDEN,) for slot in ("query", "key")} if biased else {}
                names = {slot: f"L{layer}.{site}.{number}.{slot}" for slot in shapes}
                for slot, shape in shapes.items():
                    tensors[names[slot]] = 0.3 * torch.randn(shape, generator=generator)
                options = {"activation": activation, "input": source, "step": "same" if place else "next"}
                modules.append(
                    ModuleOp(
                        site,
                        layer,
                        "bottleneck_group",
                        0,
                        0.5 + seed,
                        names,
                        options=options,
                        member=number,
                    )
                )
                number += 1
    return modules, tensors


def by_formula(
    modules: Sequence[ModuleOp], tensors: dict[str, torch.Tensor], r: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """Token by token; r, h: [hidden]."""
    stream, at = r + h, 0
    while at < len(modules):
        first, end = modules[at], at + 1
        while end < len(modules) and (modules[end].options or {})["step"] == "same":
            end += 1
        fusion = {slot: tensors[name] for slot, name in first.tensors.items()}
        x = {"sum": stream, "output": stream - r, "residual": r}[(first.options or {})["input"]]
        ups = []
        for module in modules[at:end]:
            v = {slot: tensors[name] for slot, name in module.tensors.items()}
            act = bottleneck.ACTIVATIONS[(module.options or {})["activation"]]
            ups.append(module.scale * (v["up"] @ act(v["down"] @ x + v["down_bias"]) + v["up_bias"]))
        if "query" in fusion:
            query = fusion["query"] @ x + fusion.get("query_bias", 0.0)
            scores = [query @ (fusion["key"] @ up + fusion.get("key_bias", 0.0)) for up in ups]
            shares = torch.stack(scores).softmax(0)
            values = [fusion["value"] @ up for up in ups] if "value" in fusion else ups
            stream = stream + sum(share * value for share, value in zip(shares, values, strict=True))
        else:
            stream = stream + ups[0]
        at = end
    return stream - r - h


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.none() | groups, segments), min_size=1, max_size=5))
def test_each_segment_gets_what_the_formula_says(
    actions: list[tuple[int, Groups | None, list[tuple[int, int]]]],
) -> None:
    op = BottleneckGroup(torch.float32, torch.device("cpu"))
    held: dict[int, tuple[list[ModuleOp], dict[str, torch.Tensor]]] = {}
    for seed, (slot, chosen, batch) in enumerate(actions):
        op.unload(slot)
        held.pop(slot, None)
        if chosen is not None:
            held[slot] = make_modules(chosen, seed)
            load(op, slot, held[slot][0], held[slot][1].__getitem__, LAYERS)
        packed = list[Segment]()
        for of, count in batch:
            start = packed[-1].end if packed else 0
            packed.append(Segment(of, start, start + count))
        tokens = StepTokens(tuple(packed))
        plans = op.plan_blocks(tokens)
        active = [held[one] for one in tokens.active_slots & held.keys()]
        assert plans.keys() == {module.site for modules, _ in active for module in modules}
        for block, plan in plans.items():
            for layer in range(LAYERS):
                residual, output = torch.randn(2, packed[-1].end, HIDDEN)
                term = plan.term(layer, residual, output, residual + output)
                expected = torch.zeros_like(term)
                for segment in packed:
                    modules, tensors = held.get(segment.slot, ([], {}))
                    here = [one for one in modules if (one.site, one.layer) == (block, layer)]
                    for row in range(segment.start, segment.end):
                        expected[row] = by_formula(here, tensors, residual[row], output[row])
                torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-3)
    for slot in range(3):
        op.unload(slot)
    assert op.size_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_summed_in_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    modules, tensors = make_modules({("ffn", 0): [("sum", [(4, "relu"), (4, "tanh")], "dynamic", True)]}, 1)
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    op = BottleneckGroup(dtype, torch.device("cpu"))
    load(op, 0, modules, tensors.__getitem__, LAYERS)
    residual, output = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    plan = op.plan_blocks(StepTokens((Segment(0, 0, 3),)))["ffn"]
    found = plan.term(0, residual, output, residual + output)
    assert found.dtype is dtype
    as_floats = {name: tensor.float() for name, tensor in rounded.items()}
    for row in range(3):
        expected = by_formula(modules, as_floats, residual[row].float(), output[row].float())
        torch.testing.assert_close(found[row].float(), expected, rtol=0.1, atol=0.1)
    # Each tensor is held once, but for the keys' bias, which changes no share.
    kept = sum(tensor.nbytes for name, tensor in rounded.items() if not name.endswith("key_bias"))
    assert op.size_bytes == kept
