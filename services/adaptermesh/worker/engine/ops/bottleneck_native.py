"""Bottlenecks of many adapters in the layout of the native kernels.

A layer of an adapter has one piece of memory: for each module down [width, hidden], up in panels [panels,
width, panel], ones [width], and the two biases. A table [blocks, layers] says where each of them is; a step
has one table for each token, as the low-rank op has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaptermesh.artifact.manifest import ModuleOp
from adaptermesh.artifact.sites import BLOCKS, SiteMap
from adaptermesh.worker.engine.native.library import (
    ACTIVATIONS,
    BOTTLENECK,
    INPUTS,
    LOAD,
    Bottlenecks,
    Kernels,
)
from adaptermesh.worker.engine.ops.bottleneck import options_of, read_by
from adaptermesh.worker.engine.ops.op import BlockPlan, SitePlan, StepTokens, TensorReader
from adaptermesh.worker.engine.ops.token_tables import TokenTables, token_tables

_LINE = 16
"""Floats of a cache line: where each tensor begins."""

_Table = np.ndarray[tuple[int, int], np.dtype[np.void]]


@dataclass(slots=True)
class _Adapter:
    """The table has no width for what is not loaded. `memory` by layer, `inputs` by block and layer."""

    table: _Table
    memory: dict[int, torch.Tensor]
    inputs: dict[tuple[str, int], str]
    widest: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True)
class StepBottlenecks:
    """Those of one step: what the kernels take, and the memory that it points to."""

    bottlenecks: Bottlenecks
    held: TokenTables


class NativeBottleneck:
    """The bottlenecks of all slots."""

    def __init__(self, sites: SiteMap, kernels: Kernels) -> None:
        self._hidden = sites.hidden_size
        self._layers = sites.num_layers
        self._kernels = kernels
        self._slots: dict[int, _Adapter] = {}

    def reserve(self, slot: int, modules: Sequence[ModuleOp]) -> None:
        if modules:
            table = np.zeros((len(BLOCKS), self._layers), BOTTLENECK)
            used = sum(1 << BLOCKS.index(block) for block in {module.site for module in modules})
            self._slots[slot] = _Adapter(table, {}, {}, used=used)

    def load_layer(self, slot: int, layer: int, modules: Sequence[ModuleOp], read: TensorReader) -> None:
        if not modules:
            return
        adapter = self._slots[slot]
        # Held until they are copied: what is not float32 is another tensor.
        parts = [{name: read(tensor).float() for name, tensor in one.tensors.items()} for one in modules]
        loads = np.zeros(len(modules), LOAD)
        rows = np.zeros(len(modules), BOTTLENECK)
        rows["rank"] = loads["rank"] = [len(part["down"]) for part in parts]
        adapter.memory[layer] = memory = self._lay_out(loads, rows)
        loads["from_a"] = [part["down"].data_ptr() for part in parts]
        loads["from_b"] = [part["up"].data_ptr() for part in parts]
        self._kernels.load(loads)
        start = memory.data_ptr()
        for module, part, row in zip(modules, parts, rows, strict=True):
            activation, source = options_of(module)
            row["scale"] = module.scale
            row["activation"], row["input"] = ACTIVATIONS.index(activation), INPUTS.index(source)
            for name in ("down_bias", "up_bias"):
                first = (int(row[name]) - start) // 4
                memory[first : first + len(part[name])] = part[name]
            adapter.table[BLOCKS.index(module.site), layer] = row
            adapter.inputs[module.site, layer] = source
        adapter.widest = max(adapter.widest, int(rows["rank"].max()))

    def unload(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def plan(self, tokens: StepTokens) -> Mapping[str, SitePlan]:  # noqa: ARG002 (it has no part at a site)
        return {}

    def plan_blocks(self, tokens: StepTokens) -> Mapping[str, BlockPlan]:
        step = self.rows_of(tokens)
        return {
            block: _Plan(place, self._layers, step, tokens, self._inputs(tokens, block), self._kernels)
            for place, block in enumerate(BLOCKS)
            if step.bottlenecks.used >> place & 1
        }

    def rows_of(self, tokens: StepTokens) -> StepBottlenecks:
        """Which table each token has. Built once a step, shared by all layers."""
        found = token_tables(tokens, self._slots, len(BLOCKS))
        bottlenecks = Bottlenecks(
            tables=found.tables,
            inner=found.inner,
            max_width=found.widest,
            used=found.used if found.widest else 0,
        )
        return StepBottlenecks(bottlenecks, found)

    @property
    def size_bytes(self) -> int:
        return sum(
            memory.numel() * 4 for adapter in self._slots.values() for memory in adapter.memory.values()
        )

    def _inputs(self, tokens: StepTokens, block: str) -> Mapping[tuple[int, int], str]:
        """What is read, by slot and layer."""
        return {
            (slot, layer): source
            for slot in tokens.active_slots
            if slot in self._slots
            for (name, layer), source in self._slots[slot].inputs.items()
            if name == block
        }

    def _lay_out(self, loads: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Gives the modules of one layer their places, in both tables, and the memory that these are in."""
        width, panel, hidden = loads["rank"].astype(np.int64), self._kernels.panel, self._hidden
        fields = ("a", "b", "scales", "down_bias", "up_bias")
        padded = -(-hidden // panel) * panel
        sizes = np.stack(
            [width * hidden, width * padded, width, width, np.full(len(width), padded, np.int64)], axis=1
        )
        ends = np.cumsum(-(-sizes // _LINE) * _LINE)
        memory = torch.empty(int(ends[-1]))
        starts = np.concatenate(((0,), ends[:-1])).reshape(sizes.shape)
        for column, field in enumerate(fields):
            rows[field] = memory.data_ptr() + 4 * starts[:, column]
        for field in ("a", "b", "scales"):
            loads[field] = rows[field]
        loads["inputs"] = loads["outputs"] = hidden
        loads["scale"] = 1.0
        return memory


@dataclass(frozen=True, slots=True)
class _Plan:
    """One block's share of a step, for a forward that is not the kernels' own."""

    place: int
    layers: int
    step: StepBottlenecks
    tokens: StepTokens
    inputs: Mapping[tuple[int, int], str]
    kernels: Kernels

    def term(
        self,
        layer: int,
        residual: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor,  # noqa: ARG002 (a BlockPlan's)
    ) -> torch.Tensor:
        found = torch.zeros(output.shape)
        read = torch.empty(output.shape)
        for segment in self.tokens.segments:
            source = self.inputs.get((segment.slot, layer))
            if source is not None:
                rows = slice(segment.start, segment.end)
                read[rows] = read_by(source, residual[rows], output[rows])
        index = self.place * self.layers + layer
        self.kernels.add_bottleneck(self.step.bottlenecks, index, read, found, torch.get_num_threads())
        return found
