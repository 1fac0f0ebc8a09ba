"""Virtual tokens of adapters: where they are in a step, and how they get into it or into the KV cache."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from adaptermesh.artifact.ops import KV_PREFIX, PROMPT
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.kv import KvCache
from adaptermesh.worker.engine.ops.virtual import PrefixRows, PromptRows
from adaptermesh.worker.engine.sequence import Sequence as Row
from adaptermesh.worker.engine.slots import DeviceSlots
from adaptermesh.worker.engine.upload import to_device


@dataclass(frozen=True, slots=True)
class VirtualSpan:
    """Tokens [start, start + count) of a step are an adapter's virtual ones from `first` on."""

    start: int
    slot: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class VirtualRows:
    """places: [n] int64, tokens of a step. rows: [n, hidden], their embeddings."""

    places: torch.Tensor
    rows: torch.Tensor

    def put(self, hidden: torch.Tensor) -> None:
        """hidden: [tokens, hidden], changed in place."""
        hidden.index_copy_(0, self.places, self.rows)


class VirtualTokens:
    """Those of the adapters in the slots."""

    def __init__(self, slots: DeviceSlots, cache: KvCache, *, heads_apart: bool) -> None:
        """`heads_apart`: the cache's layout, which is the forward's."""
        self._slots = slots
        self._cache = cache
        self._write = cache.write_apart if heads_apart else cache.write

    def rows(self, spans: Sequence[VirtualSpan]) -> VirtualRows | None:
        """The embeddings of a step's virtual tokens; None if it has none.

        Raises:
            MeshError: INTERNAL where the slots have no op for them.
        """
        if not spans:
            return None
        op = self._slots.ops.get(PROMPT)
        if not isinstance(op, PromptRows):
            raise _lacking(PROMPT)
        self._slots.await_arrivals(span.slot for span in spans)
        places = [span.start + place for span in spans for place in range(span.count)]
        rows = torch.cat([op.rows(span.slot, span.first, span.first + span.count) for span in spans])
        return VirtualRows(to_device(places, rows.device), rows)

    def fill(self, sequences: Iterable[Row]) -> None:
        """Writes the keys and values that are given into the blocks of sequences that lack them.

        Raises:
            MeshError: INTERNAL where the slots have no op for them.
        """
        op, cache = self._slots.ops.get(KV_PREFIX), self._cache
        size = cache.shape.block_tokens
        for sequence in sequences:
            if sequence.fill_from is None:
                continue
            if not isinstance(op, PrefixRows):
                raise _lacking(KV_PREFIX)
            start, end = sequence.fill_from, sequence.given
            self._slots.await_arrivals([sequence.slot])
            blocks = sequence.table.blocks
            places = [blocks[at // size] * size + at % size for at in range(start, end)]
            at = to_device(places, cache.data.device)
            for layer in range(cache.shape.layers):
                self._write(layer, at, op.rows(sequence.slot, layer, start, end))


def _lacking(kind: str) -> MeshError:
    """A step must not run without what an adapter puts in front of it."""
    return MeshError(Code.INTERNAL, Reason.INTERNAL, f"these slots hold no {kind}")
