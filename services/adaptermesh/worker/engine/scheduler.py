"""Who computes what in a step: continuous batching with chunked prefill and preemption.

Decodes go first, one token a running row; the rest of the step's token budget goes to prompts, in chunks;
then waiting requests join in the order of the waiting queue. A request whose adapter isn't there yet, or has
no slot, is passed by; one that was passed too often gets a slot drained for it, so nobody waits for ever. A
request that joins starts behind the tokens that the prefix cache has for it.
"""

from dataclasses import dataclass

from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.fairness import TenantCounters
from adaptermesh.worker.engine.gate import AdapterGate, Placer
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.sequence import Sequence, SequenceState
from adaptermesh.worker.engine.slots import BASE_SLOT
from adaptermesh.worker.engine.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of one sequence, from its first one that is not computed."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the last one known: its logits give the next one."""
        return self.count == self.sequence.pending

    @property
    def scores(self) -> range:
        """Positions of those of its tokens whose logits say how likely the prompt's next token is."""
        sequence = self.sequence
        if not sequence.unscored:
            return range(0)
        # After a preemption the prompt is computed anew, but nothing is told twice.
        start = max(sequence.computed, sequence.scored - 1)
        return range(start, min(sequence.computed + self.count, sequence.prompt_tokens - 1))


@dataclass(slots=True)
class _Budget:
    """What prompts may still take of a step: tokens, and tokens of prompts that are scored."""

    tokens: int
    scored: int

    def take(self, row: Row) -> None:
        self.tokens -= row.count
        self.scored -= len(row.scores)


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
        self._counters = TenantCounters(config)
        self.waiting = WaitingQueue(config, self._counters)
        self.running: list[Sequence] = []
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        if self._counters.full():
            self._counters.forget({*self.waiting.tenants, *(row.request.tenant for row in self.running)})
        self.waiting.add(sequence)

    def plan(self) -> StepPlan:
        """Chooses the rows of the next step and gives them their blocks and slots."""
        decodes, preempted = self._plan_decodes()
        for decode in decodes:
            self._charge(decode)
        budget = _Budget(self._config.step_tokens - len(decodes), self._config.scored_tokens)
        prefills: list[Row] = []
        for sequence in self.running:
            if sequence.pending > 1 and budget.tokens > 0:
                row = self._chunk(sequence, budget)
                if row is not None:
                    prefills.append(row)
        if not preempted:
            self._admit(prefills, budget)
        if not decodes and not prefills and self.running:
            # Prompts alone fill the cache: one of them starts anew later.
            self._preempt(self._victim())
        return StepPlan(tuple(_by_slot(decodes)), tuple(_by_slot(prefills)))

    def book(self, plan: StepPlan) -> None:
        """Books what a step has computed; blocks that it has filled can be shared from now on."""
        size = self._blocks.block_tokens
        for row in plan.rows:
            sequence = row.sequence
            sequence.scored += len(row.scores)
            sequence.computed += row.count
            full = sequence.computed // size
            if self._config.prefix_cache and full > sequence.table.kept:
                self._blocks.keep(sequence.table, sequence.keys.first(full, sequence.tokens, size))

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence in whatever state it is, and frees all that it holds."""
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.ENDED

    def _plan_decodes(self) -> tuple[list[Row], bool]:
        """One token for each running row; the least urgent ones give way when blocks run out."""
        preempted = False
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING or sequence.pending != 1:
                continue
            while not self._blocks.grow(sequence.table, sequence.computed + 1):
                preempted = True
                victim = self._victim()
                self._preempt(victim)
                if victim is sequence:
                    break
        return [Row(sequence, 1) for sequence in self.running if sequence.pending == 1], preempted

    def _chunk(self, sequence: Sequence, budget: _Budget) -> Row | None:
        """As many tokens of a prompt as the budget and the blocks allow, which it takes."""
        count = min(budget.tokens, sequence.pending)
        if sequence.unscored:
            told = max(0, sequence.scored - 1 - sequence.computed)
            count = min(count, told + budget.scored)
        if not count or not self._blocks.grow(sequence.table, sequence.computed + count):
            return None
        row = Row(sequence, count)
        budget.take(row)
        self._charge(row)
        return row

    def _charge(self, row: Row) -> None:
        """Books what the row costs its tenant: each prompt token once, and the token that it samples."""
        sequence = row.sequence
        end = min(sequence.computed + row.count, sequence.prompt_tokens)
        fresh = max(0, end - max(sequence.computed, sequence.charged))
        sequence.charged = max(sequence.charged, end)
        self._counters.charge(sequence.request.tenant, fresh, int(row.samples))

    def _admit(self, prefills: list[Row], budget: _Budget) -> None:
        """Lets waiting requests join while rows, tokens, blocks and slots last."""
        if not len(self.waiting) or budget.tokens <= 0 or len(self.running) >= self._config.max_batch_rows:
            return
        passed: list[tuple[Sequence, int]] = []
        joined = 0
        gate = AdapterGate(self._config, self._placer, self.running, self.waiting.starving)
        for sequence in self.waiting.in_order():
            if budget.tokens <= 0 or len(self.running) >= self._config.max_batch_rows:
                break
            if sequence.unscored and budget.scored <= 0:
                # It would hold a row and do nothing until the prompts before it are scored.
                continue
            if not self._has_room(sequence):
                # Nobody passes a request that lacks memory: the small ones would starve it.
                break
            if not self._place(sequence, gate):
                passed.append((sequence, joined))
                continue
            self._join(sequence)
            joined += 1
            row = self._chunk(sequence, budget)
            if row is not None:
                prefills.append(row)
        for sequence, before in passed:
            self.waiting.overtake(sequence, joined - before)

    def _place(self, sequence: Sequence, gate: AdapterGate) -> bool:
        if sequence.digest is None:
            sequence.slot = BASE_SLOT
            return True
        slot = gate.place(sequence.digest)
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
        # Cached blocks have no logits: a prompt that is not scored yet is computed, all of it.
        return self._config.prefix_cache and sequence.request.reuse_prefix and not sequence.unscored

    def _share_prefix(self, sequence: Sequence) -> None:
        sequence.computed = self._blocks.share(sequence.table, self._reusable(sequence))
        if sequence.timeline.scheduled_ns == 0 and self._looks_up(sequence):
            # After a preemption it would find its own tokens, which says nothing about shared prefixes.
            sequence.timeline.cached_tokens = sequence.computed
            self.prefix_hit_tokens += sequence.computed
            self.prefix_query_tokens += len(sequence.tokens)

    def _join(self, sequence: Sequence) -> None:
        self._share_prefix(sequence)
        self.waiting.join(sequence)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def _victim(self) -> Sequence:
        """The running row that gives way: of the lowest priority, and the last of these to come."""
        return min(self.running, key=lambda row: (row.level, -row.arrival))

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
