"""Prefills that begin before their adapter is whole: layer by layer, as the layers arrive."""

from collections.abc import Iterable

from adaptermesh.worker.engine.gate import Placer
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.sequence import Sequence
from adaptermesh.worker.engine.step_plan import Advance, EarlyPrefill, Row


class EarlyPrefills:
    """The open ones, at most one an adapter. `limit` bounds their tokens, whose hidden states are memory."""

    def __init__(self, limit: int, layers: int, blocks: BlockAllocator, placer: Placer) -> None:
        self._limit = limit if layers else 0
        self._layers = layers
        self._blocks = blocks
        self._placer = placer
        self._open: dict[str, EarlyPrefill] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def opened(self) -> tuple[EarlyPrefill, ...]:
        return tuple(self._open.values())

    @property
    def room(self) -> int:
        """Tokens that may still be taken in."""
        return self._limit - sum(early.tokens for early in self._open.values())

    def is_open(self, digest: str | None) -> bool:
        return digest in self._open

    def open_for(self, sequences: Iterable[Sequence]) -> list[EarlyPrefill]:
        """Opens one for each adapter of the sequences that has none open."""
        found: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            if sequence.digest is not None and sequence.digest not in self._open:
                found.setdefault(sequence.digest, []).append(sequence)
        opened = (self._open_one(digest, group) for digest, group in found.items())
        return [early for early in opened if early is not None]

    def _open_one(self, digest: str, sequences: Iterable[Sequence]) -> EarlyPrefill | None:
        """As many tokens of the sequences as room and blocks allow; None if that is none."""
        rows: list[Row] = []
        room = self.room
        for sequence in sequences:
            count = min(room, sequence.pending)
            if count > 0 and self._blocks.grow(sequence.table, sequence.computed + count):
                rows.append(Row(sequence, count))
                room -= count
        if not rows:
            return None
        early = self._open[digest] = EarlyPrefill(digest, tuple(rows))
        return early

    def plan(self, opened: Iterable[EarlyPrefill], budget: int) -> list[Advance]:
        """What a step computes of some within its budget of tokens."""
        advances: list[Advance] = []
        for early in opened:
            advance = self._plan_one(early, budget)
            if advance is not None:
                advances.append(advance)
                budget -= advance.tokens
        return advances

    def _plan_one(self, early: EarlyPrefill, budget: int) -> Advance | None:
        """None while it waits for layers."""
        arrived = self._placer.arrived(early.digest)
        ready = self._layers if arrived is None else arrived
        # One layer at least, or a small budget would never suffice.
        until = min(ready, early.done + max(1, budget * self._layers // early.tokens))
        # The logits wait for the last byte: what is corrupt behind the last layer must not be answered with.
        finishes = arrived is None and until == self._layers
        if budget <= 0 or (until <= early.done and not finishes):
            return None
        tokens = -(-early.tokens * (until - early.done) // self._layers)
        return Advance(early, until, finishes, tokens)

    def drop(self, sequence: Sequence) -> None:
        """A sequence leaves; what is computed of the one that it is in is lost, for the others too."""
        early = self._open.get(sequence.digest or "")
        if early is not None and any(row.sequence is sequence for row in early.rows):
            self.close(early)
            for row in early.rows:
                row.sequence.timeline.overlapped_ns = 0

    def close(self, early: EarlyPrefill) -> None:
        del self._open[early.digest]
        early.is_open = False
        early.passage = None
