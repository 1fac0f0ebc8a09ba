"""Who computes what in a step: continuous batching with chunked prefill and preemption.

Decodes go first, one token a running row; the rest of the step's token budget goes to prompts, in chunks;
then waiting requests join in order of arrival. A request whose adapter isn't there yet, or has no slot, is
passed by; one that was passed too often gets a slot drained for it, so nobody waits for ever. A request that
joins starts behind the tokens that the prefix cache has for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.sequence import Sequence, SequenceState
from adaptermesh.worker.engine.slots import BASE_SLOT


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of one sequence, from its first one that is not computed."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the last one known: its logits give the next one."""
        return self.count == self.sequence.pending


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of a step: decodes first, both parts sorted by slot with the base in front."""

    decodes: tuple[Row, ...]
    prefills: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.decodes + self.prefills

    def without_ended(self) -> "StepPlan":
        """The plan less the sequences that have ended since it was made."""
        kept = [
            tuple(row for row in rows if row.sequence.state is SequenceState.RUNNING)
            for rows in (self.decodes, self.prefills)
        ]
        return StepPlan(kept[0], kept[1])


class Placer(Protocol):
    """Brings adapters into device slots. What it says holds until the row gives the slot back."""

    def place(self, digest: str) -> int | None:
        """The slot that holds the adapter, counted as used by one more row; None if it can't be there now."""
        ...

    def waits_for_slot(self, digest: str) -> bool:
        """Whether all that the adapter lacks is a free slot."""
        ...

    def unplace(self, digest: str) -> None:
        """One row less uses the adapter's slot."""
        ...


@dataclass(slots=True)
class WaitingQueue:
    """Requests in the order in which they may join. First come, first served."""

    _sequences: dict[str, Sequence] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(sorted(self._sequences.values(), key=lambda sequence: sequence.arrival))

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.request.request_id, None)


class Scheduler:
    """Holds all sequences that have not ended.

    Attributes:
        prefix_query_tokens: Tokens of all prompts that were looked up in the prefix cache.
        prefix_hit_tokens: Those of them that it had.
    """

    def __init__(self, config: EngineConfig, blocks: BlockAllocator, placer: Placer) -> None:
        self._config = config
        self._blocks = blocks
        self._placer = placer
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def plan(self) -> StepPlan:
        """Chooses the rows of the next step and gives them their blocks and slots."""
        decodes, preempted = self._plan_decodes()
        budget = self._config.step_tokens - len(decodes)
        prefills: list[Row] = []
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                row = self._chunk(sequence, budget)
                if row is not None:
                    prefills.append(row)
                    budget -= row.count
        if not preempted:
            self._admit(prefills, budget)
        if not decodes and not prefills and self.running:
            # Prompts alone fill the cache: the last one to come starts anew later.
            self._preempt(self.running[-1])
        return StepPlan(tuple(_by_slot(decodes)), tuple(_by_slot(prefills)))

    def book(self, plan: StepPlan) -> None:
        """Books what a step has computed; blocks that it has filled can be shared from now on."""
        size = self._blocks.block_tokens
        for row in plan.rows:
            sequence = row.sequence
            sequence.computed += row.count
            full = sequence.computed // size
            if self._config.prefix_cache and full > sequence.table.kept:
                self._blocks.keep(sequence.table, sequence.keys.first(full, sequence.tokens, size))

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence in whatever state it is, and frees all that it holds."""
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        self.waiting.remove(sequence)
        sequence.state = SequenceState.ENDED

    def _plan_decodes(self) -> tuple[list[Row], bool]:
        """One token for each running row; the last ones to come give way when blocks run out."""
        preempted = False
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING or sequence.pending != 1:
                continue
            while not self._blocks.grow(sequence.table, sequence.computed + 1):
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
        return [Row(sequence, 1) for sequence in self.running if sequence.pending == 1], preempted

    def _chunk(self, sequence: Sequence, budget: int) -> Row | None:
        """As many tokens of a prompt as the budget and the blocks allow."""
        count = min(budget, sequence.pending)
        if not self._blocks.grow(sequence.table, sequence.computed + count):
            return None
        return Row(sequence, count)

    def _admit(self, prefills: list[Row], budget: int) -> None:
        """Lets waiting requests join while rows, tokens, blocks and slots last."""
        passed: list[Sequence] = []
        drained = self._drained()
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._config.max_batch_rows:
                return
            if not self._has_room(sequence):
                # Nobody passes a request that lacks memory: the small ones would starve it.
                return
            if sequence.digest is not None and sequence.digest in drained:
                passed.append(sequence)
                continue
            if not self._place(sequence):
                passed.append(sequence)
                continue
            self._join(sequence)
            for other in passed:
                other.overtaken += 1
            row = self._chunk(sequence, budget)
            if row is not None:
                prefills.append(row)
                budget -= row.count

    def _drained(self) -> set[str]:
        """Adapters that take no new rows, so that a starving request gets their slot.

        One slot for each starving request, the one with the fewest tokens left first.
        """
        starving = {
            sequence.digest
            for sequence in self.waiting
            if sequence.digest is not None
            and sequence.overtaken >= self._config.max_overtakes
            and self._placer.waits_for_slot(sequence.digest)
        }
        if not starving:
            return set()
        left: dict[str, int] = {}
        for sequence in self.running:
            if sequence.digest is not None:
                left[sequence.digest] = left.get(sequence.digest, 0) + sequence.remaining
        return set(sorted(left, key=lambda digest: (left[digest], digest))[: len(starving)])

    def _place(self, sequence: Sequence) -> bool:
        if sequence.digest is None:
            sequence.slot = BASE_SLOT
            return True
        slot = self._placer.place(sequence.digest)
        if slot is None:
            return False
        sequence.slot = slot
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether blocks are there for all of a waiting sequence's tokens and one more."""
        tokens = len(sequence.tokens) + 1
        if self._blocks.missing(sequence.table, tokens) <= self._blocks.free:
            # What fits without the cache fits with it.
            return True
        return self._blocks.has_room(tokens, self._reusable(sequence))

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that a waiting sequence may take from the cache.

        At least one token stays to be computed, because the logits of the last one are needed.
        """
        if not self._looks_up(sequence):
            return []
        size = self._blocks.block_tokens
        return sequence.keys.first((len(sequence.tokens) - 1) // size, sequence.tokens, size)

    def _looks_up(self, sequence: Sequence) -> bool:
        return self._config.prefix_cache and sequence.request.reuse_prefix

    def _share_prefix(self, sequence: Sequence) -> None:
        sequence.computed = self._blocks.share(sequence.table, self._reusable(sequence))
        if sequence.timeline.scheduled_ns == 0 and self._looks_up(sequence):
            # After a preemption it would find its own tokens, which says nothing about shared prefixes.
            sequence.timeline.cached_tokens = sequence.computed
            self.prefix_hit_tokens += sequence.computed
            self.prefix_query_tokens += len(sequence.tokens)

    def _join(self, sequence: Sequence) -> None:
        self._share_prefix(sequence)
        self.waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a row out of the batch; it waits in its old place and computes its tokens anew."""
        self._leave(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence.table)
        sequence.computed = 0
        sequence.slot = BASE_SLOT
        if sequence.digest is not None:
            self._placer.unplace(sequence.digest)


def _by_slot(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.sequence.slot, row.sequence.arrival))
