"""Embeddings, last norm and head of adapters in many slots, against one weight made of each."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.core.errors import MeshError, Reason
from adaptermesh.worker.engine.ops.around import Around
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import NoWeights, load
from tests.unit.worker.engine.ops.test_affine import CPU, LAYERS, SITES

HIDDEN, VOCABULARY = SITES.hidden_size, 9
GENERATOR = torch.Generator().manual_seed(0)
EMBEDDINGS = torch.randn(VOCABULARY, HIDDEN, generator=GENERATOR)
HEAD = torch.randn(VOCABULARY, HIDDEN, generator=GENERATOR)
NORM = torch.rand(HIDDEN, generator=GENERATOR) + 0.5
PARTS = ("lowrank", "rows", "weight", "affine", "norm")
Tensors = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Made = tuple[list[ModuleOp], Tensors]


class Weights(NoWeights):
    """A base with a last norm, and no more."""

    def __init__(self, norm: torch.Tensor | None = NORM) -> None:
        self._norm = norm

    def norm(self, site: str, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert (site, layer) == ("final_norm", LAYERS - 1)
        return self._norm, None


def adapter(parts: frozenset[str], site: str, seed: int) -> tuple[list[ModuleOp], Tensors]:
    generator = torch.Generator().manual_seed(seed)
    layer = 0 if site == "embed" else LAYERS - 1
    inputs, outputs = (VOCABULARY, HIDDEN) if site == "embed" else (HIDDEN, VOCABULARY)
    tokens = tuple(torch.randperm(VOCABULARY, generator=generator)[: 1 + seed % 4].tolist())
    found: list[ModuleOp] = []
    tensors: dict[str, torch.Tensor] = {}

    def add(
        op: str, place: str, shapes: Mapping[str, tuple[int, ...]], rank: int = 0, scale: float = 1.0
    ) -> None:
        names = {slot: f"L{layer}.{place}.{op}.{slot}" for slot in shapes}
        tensors.update(
            {names[slot]: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
        )
        ids = tokens if op == "token_rows" else ()
        found.append(ModuleOp(place, layer, op, rank, scale, names, tokens=ids))

    if "lowrank" in parts:
        add("lowrank", site, {"A": (3, inputs), "B": (outputs, 3)}, 3, 1.5)
    if "rows" in parts:
        add("token_rows", site, {"rows": (len(tokens), HIDDEN)})
    if "weight" in parts:
        add("replace", site, {"weight": (VOCABULARY, HIDDEN)})
    if "affine" in parts and site == "lm_head":
        slots = {"in_scale": (HIDDEN,), "out_scale": (VOCABULARY,), "bias_delta": (VOCABULARY,)}
        add("affine", site, slots, scale=0.5)
    if "norm" in parts and site == "lm_head":
        add("replace", "final_norm", {"weight": (HIDDEN,)})
    return found, tensors


def weight_of(modules: list[ModuleOp], tensors: Tensors, base: torch.Tensor) -> torch.Tensor:
    """[vocabulary, hidden], of one adapter alone."""
    found = base.clone()
    for module in modules:
        if module.op == "replace" and module.site in ("embed", "lm_head"):
            found = tensors[module.tensors["weight"]].clone()
    for module in modules:
        if module.op == "token_rows":
            found[list(module.tokens)] = tensors[module.tensors["rows"]]
    for module in modules:
        if module.op == "lowrank":
            delta = module.scale * tensors[module.tensors["B"]] @ tensors[module.tensors["A"]]
            found = found + (delta.T if module.site == "embed" else delta)
    return found


def logits_of(modules: list[ModuleOp], tensors: Tensors, normed: torch.Tensor) -> torch.Tensor:
    """normed: [n, hidden], with the base's last norm."""
    vectors: dict[str, torch.Tensor] = {}
    for module in modules:
        if module.site == "final_norm":
            normed = normed / NORM * tensors[module.tensors["weight"]]
        if module.op == "affine":
            vectors = {slot: tensors[name] for slot, name in module.tensors.items()}
    y = f.linear(normed * vectors.get("in_scale", 1.0), weight_of(modules, tensors, HEAD))
    return y * vectors.get("out_scale", 1.0) + 0.5 * vectors.get("bias_delta", torch.zeros(()))


PART_SETS = st.frozensets(st.sampled_from(PARTS))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PART_SETS, PART_SETS), min_size=1, max_size=4))
def test_rows_of_many_adapters_equal_each_of_them_alone(
    adapters: list[tuple[frozenset[str], frozenset[str]]],
) -> None:
    op = Around(SITES, torch.float32, CPU, Weights())
    held: dict[int, tuple[Made, Made]] = {}
    for slot, (before, after) in enumerate(adapters):
        held[slot] = adapter(before, "embed", slot), adapter(after, "lm_head", slot + 50)
        modules = [*held[slot][0][0], *held[slot][1][0]]
        tensors = {**held[slot][0][1], **held[slot][1][1]}
        load(op, slot, modules, tensors.__getitem__, LAYERS)
    # Each slot twice, the base between.
    slots = [-1, *held, -1, *held]
    generator = torch.Generator().manual_seed(len(slots))
    counts = torch.randint(1, 4, (len(slots),), generator=generator).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    segments = tuple(
        Segment(slot, end - count, end) for slot, count, end in zip(slots, counts, ends, strict=True)
    )
    outputs = tuple(range(0, ends[-1], 2))
    tokens = StepTokens(segments, (), outputs)
    ids = torch.randint(VOCABULARY, (ends[-1],), generator=generator)
    hidden = EMBEDDINGS[ids] * 3.0
    op.embed(tokens, ids, hidden, 3.0)
    normed = torch.randn(len(outputs), HIDDEN, generator=generator)
    logits = f.linear(normed, HEAD)
    op.head(tokens, lambda rows: normed[rows], lambda x: f.linear(x, HEAD), logits)
    for segment in segments:
        own = slice(segment.start, segment.end)
        rows = [place for place, token in enumerate(outputs) if segment.start <= token < segment.end]
        if segment.slot < 0:
            assert torch.equal(hidden[own], EMBEDDINGS[ids[own]] * 3.0)
            assert torch.equal(logits[rows], f.linear(normed, HEAD)[rows])
            continue
        before_part, after_part = held[segment.slot]
        weight = weight_of(*before_part, EMBEDDINGS)
        torch.testing.assert_close(hidden[own], 3.0 * weight[ids[own]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[rows], logits_of(*after_part, normed[rows]), rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_tensors_and_given_back() -> None:
    op = Around(SITES, torch.float32, CPU, Weights())
    modules, tensors = adapter(frozenset(PARTS), "lm_head", 2)
    load(op, 3, modules, tensors.__getitem__, LAYERS)
    ids = next(len(module.tokens) for module in modules if module.op == "token_rows")
    assert op.size_bytes == sum(tensor.nbytes for tensor in tensors.values()) + 8 * ids
    op.unload(3)
    assert op.size_bytes == 0


@pytest.mark.parametrize("norm", [None, torch.zeros(HIDDEN)])
def test_a_norm_that_puts_out_nothing_can_not_be_replaced(norm: torch.Tensor | None) -> None:
    op = Around(SITES, torch.float32, CPU, Weights(norm))
    modules, tensors = adapter(frozenset({"norm"}), "lm_head", 2)
    with pytest.raises(MeshError, match="final_norm of layer 1 has a weight of zero") as caught:
        load(op, 0, modules, tensors.__getitem__, LAYERS)
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED


def test_a_norm_needs_a_base_in_its_own_numbers() -> None:
    op = Around(SITES, torch.float32, CPU, None)
    modules, tensors = adapter(frozenset({"norm"}), "lm_head", 2)
    with pytest.raises(MeshError, match="holds them in 8 bits"):
        load(op, 0, modules, tensors.__getitem__, LAYERS)
