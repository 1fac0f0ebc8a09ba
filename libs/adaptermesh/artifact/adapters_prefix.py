"""The `adapters` library's prefix tuning: keys and values in front of a prompt, as the op `kv_prefix`.

One pool holds what all layers get, and every layer refers to it: a file has it once for each, or once. A
projection is evaluated here, with sums in one order and a tanh of plain operations, so that a version has the
same digest on every machine. The positions of a prompt's tokens are as without the prefix.
"""

from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np

from adaptermesh.artifact.adapters_methods import PrefixConfig
from adaptermesh.artifact.adapters_tensors import Reading, check_slots, group
from adaptermesh.artifact.canonical import tensor_from_file
from adaptermesh.artifact.manifest_parts import MAX_VIRTUAL_TOKENS, TensorEntry
from adaptermesh.artifact.matrices import Doubles, product, tanh
from adaptermesh.artifact.ops import START
from adaptermesh.artifact.plan import Blocks, Entries, Plan, Shape, check_one_dtype
from adaptermesh.artifact.prefix_parts import prefix_of, stored_part
from adaptermesh.artifact.problems import Problems, shown
from adaptermesh.artifact.sites import key_heads
from adaptermesh.artifact.uploaded import Uploaded

_WHERE = "self_prefix"
_ENDS = (".prefix_tuning", ".prefix_tuning.pool")


def plan_prefix(
    config: PrefixConfig,
    reading: Reading,
) -> Plan:
    """What a prefix tuning becomes; of use only if no problem was noted."""
    sites, base, problems = reading.sites, reading.base, reading.problems
    heads, dim = key_heads(base)
    found = group(reading, config.container)
    check_slots("what all modules share", found.shared, {}, "a prefix shares nothing else", problems)
    shapes = _shapes(config, base.hidden_size, 2 * sites.num_layers * heads * dim)
    why = f"prefix_length {config.prefix_length} from the config, the widths from {base.title}"
    for module, entries in found.modules.items():
        if not module.endswith(_ENDS):
            problems.add(f"module {shown(module)} has tensors, but a prefix has none there")
        check_slots(f"module {shown(module)}", entries, shapes, why, problems)
        check_one_dtype(module, entries, problems)
    if not found.modules:
        problems.add(f"the file has no prefix of the name {shown(reading.name)}")
    if reading.failed:
        return Plan()
    entries = next(iter(found.modules.values()))
    _compare(found.modules, entries, reading.upload, problems)
    if reading.failed:
        return Plan()
    if config.prefix_length > MAX_VIRTUAL_TOKENS:
        length = config.prefix_length
        return Plan(unservable=f"not served: a prefix of {length} tokens, the most is {MAX_VIRTUAL_TOKENS}")
    shape = (heads, config.prefix_length, dim)
    if config.flat:
        entry = entries[f"{_WHERE}.control_trans"]
        stored = (config.prefix_length, 2 * sites.num_layers, heads, dim)
        return prefix_of(
            lambda part: stored_part(entry, part, stored), shape, sites.num_layers, entry.dtype, START
        )
    projected = _Projected(entries, config.activation, heads, dim)
    return prefix_of(projected.part, shape, sites.num_layers, "F32", START).bounded("prefix")


def _shapes(config: PrefixConfig, hidden: int, width: int) -> dict[str, Shape]:
    """`width`: of the keys and values of all layers."""
    if config.flat:
        return {f"{_WHERE}.control_trans": (config.prefix_length * width,)}
    inner = config.bottleneck_size
    return {
        f"{_WHERE}.wte.weight": (config.prefix_length, hidden),
        f"{_WHERE}.control_trans.0.weight": (inner, hidden),
        f"{_WHERE}.control_trans.0.bias": (inner,),
        f"{_WHERE}.control_trans.2.weight": (width, inner),
        f"{_WHERE}.control_trans.2.bias": (width,),
    }


def _compare(modules: Mapping[str, Entries], first: Entries, upload: Uploaded, problems: Problems) -> None:
    """To the library all copies are one tensor: a file in which they differ was changed by somebody."""
    for module, entries in modules.items():
        for slot, entry in entries.items():
            other = first[slot]
            if entry is not other and upload.values(entry).tobytes() != upload.values(other).tobytes():
                problems.add(f"module {shown(module)} has another {slot} than the first: they are one tensor")


class _Projected:
    """Keys and values as a projection of embeddings: W2 act(W1 e + b1) + b2 for each token of the prefix."""

    def __init__(self, entries: Entries, activation: str, heads: int, dim: int) -> None:
        self._entries = entries
        self._activation = activation
        self._heads, self._dim = heads, dim
        self._inner: Doubles | None = None

    def part(self, part: int) -> Blocks:
        """One layer's keys or values: [heads, tokens, dim] float32."""
        width = self._heads * self._dim

        def blocks(file: BinaryIO) -> Iterable[bytes]:
            inner = self._hidden(file)
            weight = self._rows(file, "control_trans.2.weight", part * width, width)
            bias = self._rows(file, "control_trans.2.bias", part * width, width)
            values = (product(inner, weight.T) + bias).reshape(len(inner), self._heads, self._dim)
            return (np.ascontiguousarray(values.transpose(1, 0, 2), "<f4").tobytes(),)

        return blocks

    def _hidden(self, file: BinaryIO) -> Doubles:
        """[tokens, inner]; computed once, with the first part."""
        if self._inner is None:
            embeddings, weight, bias = (
                self._read(file, slot)
                for slot in ("wte.weight", "control_trans.0.weight", "control_trans.0.bias")
            )
            inner = product(embeddings, weight.T) + bias
            self._inner = tanh(inner) if self._activation == "tanh" else np.maximum(inner, 0.0)
        return self._inner

    def _read(self, file: BinaryIO, slot: str) -> Doubles:
        return tensor_from_file(self._entries[f"{_WHERE}.{slot}"], file).astype(np.float64)

    def _rows(self, file: BinaryIO, slot: str, start: int, count: int) -> Doubles:
        """Some rows of a tensor, without reading the others."""
        entry = self._entries[f"{_WHERE}.{slot}"]
        row = entry.size // entry.shape[0]
        shape = (count, *entry.shape[1:])
        part = TensorEntry(entry.name, entry.dtype, shape, entry.offset + start * row, count * row)
        return tensor_from_file(part, file).astype(np.float64)
