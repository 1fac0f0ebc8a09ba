"""Interventions at the ends of a prompt, however the prompt is cut and whoever is in the batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.op import RowTokens, Segment, StepTokens
from adaptermesh.worker.engine.ops.reft import Reft
from tests.unit.worker.engine.ops.loading import load

HIDDEN, RANK, LAYERS = 12, 2, 2


def make_op(prefix: int, suffix: int, tied: bool) -> tuple[Reft, dict[str, torch.Tensor]]:
    """Slot 1 has it in layer 1 alone."""
    generator = torch.Generator().manual_seed(prefix + 7 * suffix)
    ends = ("",) if tied else (("",) if prefix else ()) + (("_suffix",) if suffix else ())
    shapes = {"R": (RANK, HIDDEN), "W": (RANK, HIDDEN), "b": (RANK,)}
    values = {
        f"{slot}{end}": torch.randn(shape, generator=generator)
        for end in ends
        for slot, shape in shapes.items()
    }
    options = {"activation": "tanh", "subtract": "yes", "prefix": str(prefix), "suffix": str(suffix)}
    module = ModuleOp(
        "ffn", 1, "reft", RANK, 1.0, {slot: f"L1.ffn.{slot}" for slot in values}, options=options
    )
    op = Reft(torch.float32, torch.device("cpu"))
    load(op, 1, [module], {f"L1.ffn.{slot}": value for slot, value in values.items()}.__getitem__, LAYERS)
    return op, values


def by_formula(
    x: torch.Tensor, prompt: int, prefix: int, suffix: int, values: dict[str, torch.Tensor]
) -> torch.Tensor:
    """x: [tokens, hidden], of a whole sequence."""
    found = torch.zeros_like(x)
    for token in range(prompt):
        end = "_suffix" if token >= prompt - suffix else ""
        if not end and token >= prefix:
            continue
        names = (f"{slot}{end}" for slot in "RWb")
        r, w, b = (values[name if name in values else name[0]] for name in names)
        found[token] = (torch.tanh(w @ x[token] + b) - r @ x[token]) @ r
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 4),
    st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any),
    st.booleans(),
    st.lists(st.integers(1, 5), min_size=1, max_size=16),
)
def test_a_prompt_in_pieces_beside_others_equals_the_formula(
    prompt: int, output: int, ends: tuple[int, int], tied: bool, cuts: list[int]
) -> None:
    op, values = make_op(*ends, tied)
    residual, own = torch.randn(2, prompt + output, HIDDEN)
    expected = by_formula(residual + own, prompt, *ends, values)
    past, pieces = 0, cuts + [1] * (prompt + output)
    found = []
    while past < prompt + output:
        count = min(pieces.pop(0), prompt + output - past)
        # A row of the base before it, one of an empty slot behind it.
        rows = (
            RowTokens(0, 3, 0, 9),
            RowTokens(3, 3 + count, past, prompt),
            RowTokens(3 + count, 5 + count, 0, 2),
        )
        segments = (Segment(-1, 0, 3), Segment(1, 3, 3 + count), Segment(0, 3 + count, 5 + count))
        plans = op.plan_blocks(StepTokens(segments, rows))
        part = slice(past, past + count)
        before, after = [
            torch.cat((torch.randn(3, HIDDEN), of[part], torch.randn(2, HIDDEN))) for of in (residual, own)
        ]
        if plans:
            term = plans["ffn"].term(1, before, after, before + after)
            assert not plans["ffn"].term(0, before, after, before + after).any()
        else:
            term = torch.zeros_like(before)
        assert not term[:3].any()
        assert not term[3 + count :].any()
        found.append(term[3 : 3 + count])
        past += count
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
    # A generated token has no part in it, and neither has a step of nothing else.
    decode = StepTokens((Segment(1, 0, 1),), (RowTokens(0, 1, prompt, prompt),))
    assert op.plan_blocks(decode) == {}
    assert op.size_bytes == sum(value.numel() * 4 for value in values.values())
    op.unload(1)
    assert op.size_bytes == 0
