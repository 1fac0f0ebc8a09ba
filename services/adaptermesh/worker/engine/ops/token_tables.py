"""What the native ops hand to the kernels: for each token of a step, the table of its own adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from adaptermesh.worker.engine.ops.op import StepTokens


class SlotTable(Protocol):
    """The modules of one slot, as the kernels read them.

    `table` holds their places, `widest` the most rows that one of them has, `used` a bit for each place of
    the layer that any of them is at.
    """

    @property
    def table(self) -> np.ndarray: ...

    @property
    def widest(self) -> int: ...

    @property
    def used(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TokenTables:
    """Those of one step. The addresses hold as long as this does."""

    tables: int
    inner: int
    widest: int
    used: int
    held: tuple[object, ...]


def token_tables(tokens: StepTokens, slots: Mapping[int, SlotTable], places: int) -> TokenTables:
    """Built once a step, shared by all layers. A token without an adapter has no table.

    `inner` is room for what the kernels compute between the two products, [places, tokens, widest] floats.
    """
    count = tokens.segments[-1].end
    tables = np.zeros(count, np.int64)
    held: list[object] = [tables]
    widest, used = 0, 0
    for segment in tokens.segments:
        slot = slots.get(segment.slot)
        if slot is not None:
            tables[segment.start : segment.end] = slot.table.ctypes.data
            held.append(slot)
            widest, used = max(widest, slot.widest), used | slot.used
    inner = torch.empty(places * count * widest)
    held.append(inner)
    return TokenTables(tables.ctypes.data, inner.data_ptr(), widest, used, tuple(held))
