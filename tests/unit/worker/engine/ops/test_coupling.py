"""Couplings before the first layer: undone by their inverse, and of their own rows alone."""

import pytest
import torch
from torch.nn import functional as f

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.worker.engine.ops.coupling import Coupling
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from tests.unit.worker.engine.ops.loading import load

CPU = torch.device("cpu")


def made(hidden: int, seed: int) -> tuple[ModuleOp, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    first, second = hidden // 2, hidden - hidden // 2
    shapes: dict[str, tuple[int, ...]] = {}
    for net, inputs, outputs in (("F", second, first), ("G", first, second)):
        shapes |= {f"{net}_down": (3, inputs), f"{net}_down_bias": (3,)}
        shapes |= {f"{net}_up": (outputs, 3), f"{net}_up_bias": (outputs,)}
    names = {slot: f"L0.stream.{slot}" for slot in shapes}
    tensors = {names[slot]: torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
    return ModuleOp("stream", 0, "coupling", 0, 1.0, names, options={"activation": "relu"}), tensors


def net(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    part = {slot: tensors[f"L0.stream.{name}_{slot}"] for slot in ("down", "down_bias", "up", "up_bias")}
    return f.linear(f.relu(f.linear(x, part["down"], part["down_bias"])), part["up"], part["up_bias"])


@pytest.mark.parametrize("hidden", [8, 7])
def test_it_is_undone_by_its_inverse_for_its_own_rows(hidden: int) -> None:
    op = Coupling(torch.float32, CPU)
    adapters = {slot: made(hidden, slot) for slot in (0, 1)}
    for slot, (module, tensors) in adapters.items():
        load(op, slot, [module], tensors.__getitem__, 2)
    slots = [-1, 0, 1, -1, 0]
    tokens = StepTokens(tuple(Segment(slot, 2 * place, 2 * place + 2) for place, slot in enumerate(slots)))
    before = torch.randn(10, hidden, generator=torch.Generator().manual_seed(9))
    after = before.clone()
    op.enter(tokens, after)
    half = hidden // 2
    for place, slot in enumerate(slots):
        rows = slice(2 * place, 2 * place + 2)
        if slot < 0:
            assert torch.equal(after[rows], before[rows])
            continue
        assert not torch.allclose(after[rows], before[rows])
        tensors = adapters[slot][1]
        first, second = after[rows, :half], after[rows, half:]
        second = second - net(tensors, "G", first)
        first = first - net(tensors, "F", second)
        torch.testing.assert_close(torch.cat([first, second], 1), before[rows], rtol=1e-4, atol=1e-4)
    op.unload(0)
    op.unload(1)
    assert op.size_bytes == 0
