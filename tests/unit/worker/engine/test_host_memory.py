"""Blocks of host memory: lent, used again, and never more held than the budget without need."""

import gc
import itertools
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptermesh.worker.engine.host_memory import HostMemory

CPU = torch.device("cpu")
MIB = 2**20


def test_next_adapter_gets_the_memory_of_the_last_one() -> None:
    memory = HostMemory(CPU, 10 * MIB)
    first = memory.allocate(MIB + 5)
    address = first.data_ptr()
    assert first.shape == (MIB + 5,)
    del first
    assert memory.allocate(MIB + 900).data_ptr() == address


def test_a_view_keeps_the_block_lent() -> None:
    memory = HostMemory(CPU, 10 * MIB)
    first = memory.allocate(MIB)
    address, view = first.data_ptr(), first[16:32].view(torch.float32)
    held = first[:8].numpy()
    del first
    second = memory.allocate(MIB)
    assert second.data_ptr() != address
    del view
    assert memory.allocate(MIB).data_ptr() != address
    del held
    gc.collect()
    assert memory.allocate(MIB).data_ptr() in {address, second.data_ptr() + MIB} or memory.spare_bytes


def test_a_block_much_too_large_is_left_for_larger_ones() -> None:
    memory = HostMemory(CPU, 100 * MIB)
    large = memory.allocate(8 * MIB)
    address = large.data_ptr()
    del large
    assert memory.allocate(2 * MIB).data_ptr() != address
    assert memory.allocate(5 * MIB).data_ptr() == address


def test_memory_that_the_system_refuses_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(CPU, 8 * MIB)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(OSError, match="allocate"):
            memory.allocate(3 * MIB)
    kept, gone = memory.allocate(MIB), memory.allocate(2 * MIB)
    del gone
    larger = memory.allocate(3 * MIB)
    assert len(kept) + len(larger) == 4 * MIB
    assert memory.spare_bytes == 2 * MIB, "six of the eight are held: nothing has to go back"


def test_nothing_is_an_empty_tensor() -> None:
    assert HostMemory(CPU, MIB).allocate(0).shape == (0,)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * MIB)), max_size=40))
def test_blocks_never_overlap_and_spare_ones_stay_within_the_budget(calls: list[tuple[bool, int]]) -> None:
    budget = 16 * MIB
    memory = HostMemory(CPU, budget)
    lent: list[torch.Tensor] = []
    for allocates, number in calls:
        if allocates or not lent:
            data = memory.allocate(number)
            data[0] = data[-1] = len(lent) % 256
            lent.append(data)
        else:
            lent.pop(number % len(lent))
            data = None
        ranges = sorted((one.data_ptr(), one.data_ptr() + len(one)) for one in lent)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        used = sum(-(-len(one) // MIB) * MIB for one in lent)
        if allocates and used <= budget:
            assert used + memory.spare_bytes <= 2 * budget
