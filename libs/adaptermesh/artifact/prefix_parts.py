"""A prefix's modules and tensors, whichever library wrote it: keys and values of each layer."""

from collections.abc import Callable, Iterable
from typing import BinaryIO

import numpy as np

from adaptermesh.artifact.manifest_parts import TENSOR_DTYPES, ModuleOp, TensorEntry
from adaptermesh.artifact.ops import KV_PREFIX
from adaptermesh.artifact.plan import Blocks, Plan, PlannedTensor
from adaptermesh.artifact.safetensors_file import TensorSpec
from adaptermesh.artifact.sites import ATTENTION


def prefix_of(
    part: Callable[[int], Blocks], shape: tuple[int, int, int], layers: int, dtype: str, positions: str
) -> Plan:
    """The plan of a prefix. shape: [heads, tokens, dim] of one layer's keys.

    `part` gives the keys of layer n as number 2 n, and its values as the next one.
    """
    modules: list[ModuleOp] = []
    tensors: list[PlannedTensor] = []
    for layer in range(layers):
        names = {slot: f"L{layer}.{ATTENTION}.{slot}" for slot in ("k", "v")}
        options = {"positions": positions}
        modules.append(ModuleOp(ATTENTION, layer, KV_PREFIX, 0, 1.0, names, dtype, options=options))
        for number, name in enumerate(names.values()):
            tensors.append(PlannedTensor(TensorSpec(name, dtype, shape), layer, part(2 * layer + number)))
    return Plan(tuple(modules), tuple(tensors))


def stored_part(entry: TensorEntry, part: int, shape: tuple[int, ...]) -> Blocks:
    """One layer's keys or values, [heads, tokens, dim], out of [tokens, parts, heads, dim], bit by bit."""

    def blocks(file: BinaryIO) -> Iterable[bytes]:
        dtype = f"<u{TENSOR_DTYPES[entry.dtype]}"
        # Mapped: a part is spread over the whole tensor, which need not be in memory for it.
        values = np.memmap(file, dtype, "r", entry.offset, shape)
        return (np.ascontiguousarray(values[:, part].transpose(1, 0, 2)).tobytes(),)

    return blocks
