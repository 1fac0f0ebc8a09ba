"""Bottlenecks of the native kernels against torch's, under slots that come and go."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.ops import ACTIVATIONS, BOTTLENECK_INPUTS
from adaptermesh.artifact.sites import BLOCKS, SiteMap
from adaptermesh.worker.engine.native import library
from adaptermesh.worker.engine.native.library import Kernels
from adaptermesh.worker.engine.ops.bottleneck import Bottleneck
from adaptermesh.worker.engine.ops.bottleneck_native import NativeBottleneck
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import load

LAYERS = 2
# Fills no panel and no vector.
HIDDEN = 45

Modules = Sequence[tuple[str, int, int, str, str]]
"""(block, layer, width, activation, input)."""

modules = st.lists(
    st.tuples(
        st.sampled_from(BLOCKS),
        st.integers(0, LAYERS - 1),
        st.integers(1, 40),
        st.sampled_from(sorted(ACTIVATIONS)),
        st.sampled_from(sorted(BOTTLENECK_INPUTS)),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda module: module[:2],
)
segments = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 9)), min_size=1, max_size=6)


def test_the_kernels_know_every_activation_and_input() -> None:
    assert set(library.ACTIVATIONS) == ACTIVATIONS
    assert set(library.INPUTS) == BOTTLENECK_INPUTS


def make_modules(chosen: Modules, seed: int) -> tuple[list[ModuleOp], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found, tensors = list[ModuleOp](), dict[str, torch.Tensor]()
    for block, layer, width, activation, source in chosen:
        shapes = {"down": (width, HIDDEN), "down_bias": (width,), "up": (HIDDEN, width), "up_bias": (HIDDEN,)}
        names = {name: f"L{layer}.{block}.{name}" for name in shapes}
        for name, shape in shapes.items():
            tensors[names[name]] = torch.randn(shape, generator=generator).to(
                torch.bfloat16 if seed % 2 else torch.float32
            )
        options = {"activation": activation, "input": source}
        found.append(ModuleOp(block, layer, "bottleneck", 0, 0.5 + seed, names, options=options))
    return found, tensors


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.none() | modules, segments), min_size=1, max_size=6))
def test_slots_used_again_and_again_equal_the_twin(
    kernels: Kernels, actions: list[tuple[int, Modules | None, list[tuple[int, int]]]]
) -> None:
    fast = NativeBottleneck(SiteMap((), {}, LAYERS, (), "l.{layer}", {}, HIDDEN), kernels)
    plain = Bottleneck(torch.float32, torch.device("cpu"))
    for seed, (slot, chosen, batch) in enumerate(actions):
        for op in (fast, plain):
            op.unload(slot)
            if chosen is not None:
                found, tensors = make_modules(chosen, seed)
                load(op, slot, found, tensors.__getitem__, LAYERS)
        packed = list[Segment]()
        for of, count in batch:
            start = packed[-1].end if packed else 0
            packed.append(Segment(of, start, start + count))
        tokens = StepTokens(tuple(packed))
        expected, blocks = plain.plan_blocks(tokens), fast.plan_blocks(tokens)
        assert blocks.keys() == expected.keys()
        for block in expected:
            for layer in range(LAYERS):
                residual, output = torch.randn(2, packed[-1].end, HIDDEN)
                given = (layer, residual, output, residual + output)
                term = blocks[block].term(*given)
                torch.testing.assert_close(term, expected[block].term(*given), rtol=1e-4, atol=1e-3)
                for segment in packed:
                    if segment.slot < 0:
                        assert not term[segment.start : segment.end].any()
    for slot in range(4):
        fast.unload(slot)
        plain.unload(slot)
    assert (fast.size_bytes, plain.size_bytes) == (0, 0)
