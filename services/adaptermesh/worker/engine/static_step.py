"""The buffers of a step of decodes that stay where they are, for a graph to read."""

from collections.abc import Callable

import torch

from adaptermesh.worker.engine.batch import HostStep, StepBatch
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.paged_attention import PagedPlan, PagedRows, PagedWay, token_places
from adaptermesh.worker.engine.slots import AdapterPlan

_FIELDS = 4
"""Token, position, place and number of keys."""


class StaticStep:
    """Room for `rows` decodes of up to `width` blocks. One copy a step brings all of it to the device.

    The host's side is written again only after the step before has given its tokens, so its copy is done.
    """

    def __init__(self, rows: int, width: int, way: PagedWay, cache: KvCache, device: torch.device) -> None:
        self.rows = rows
        self._way = way
        self._block_tokens = cache.shape.block_tokens
        self._scratch = cache.scratch_block * self._block_tokens
        size = rows * (_FIELDS + width)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        fields, table = self._host.split([rows * _FIELDS, rows * width])
        self._host_fields, self._host_table = (
            fields.view(_FIELDS, rows).numpy(),
            table.view(rows, width).numpy(),
        )
        fields, table = self._device.split([rows * _FIELDS, rows * width])
        self._fields, self._table = fields.view(_FIELDS, rows), table.view(rows, width)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._outputs = torch.arange(rows, device=device)
        self._no_tiles = torch.empty((0, 2), dtype=torch.int32, device=device)
        self._blocks: list[tuple[int, ...]] = [()] * rows

    def fill(self, step: HostStep, rows: int) -> None:
        """Writes a step; the rows from its end to `rows` see nothing and write into the scratch block."""
        count = len(step.spans)
        fields = self._host_fields
        fields[0, :count], fields[1, :count] = step.token_ids, step.positions
        fields[2, :count] = [token_places(span, self._block_tokens)[0] for span in step.spans]
        fields[3, :count] = [span.past + 1 for span in step.spans]
        fields[:, count:rows] = [[0], [0], [self._scratch], [0]]
        for row, span in enumerate(step.spans):
            # Most rows have the blocks of the step before: 64 long tables cost more to write than to compare.
            if span.blocks != self._blocks[row]:
                self._host_table[row, : len(span.blocks)] = self._blocks[row] = span.blocks
        self._device.copy_(self._host, non_blocking=True)

    def batch(self, rows: int, adapters: AdapterPlan) -> Callable[[], StepBatch]:
        """Makes the batch of the first `rows` rows from what the buffers hold when it is called."""
        paged = PagedRows(
            decodes=rows,
            starts=self._starts[: rows + 1],
            used=self._fields[3, :rows],
            table=self._table[:rows],
            tiles=self._no_tiles,
            tile_tokens=1,
            most_tokens=1,
            most_keys=self._table.shape[1] * self._block_tokens,
        )

        def make() -> StepBatch:
            ids, positions, places = self._fields[:3, :rows].long().unbind(0)
            attention = PagedPlan(self._way, paged, places)
            return StepBatch(ids, positions, self._outputs[:rows], attention, adapters)

        return make
