"""Who computes what in a step: continuous batching with chunked prefill and preemption.

Decodes go first, one token a running row; the rest of the step's token budget goes to prompts, in chunks;
then waiting requests join in the order of the waiting queue. A request whose adapter isn't there yet, or has
no slot, is passed by; one that was passed too often gets a slot drained for it, so nobody waits for ever. A
request that joins starts behind the tokens that the prefix cache has for it; while a row computes tokens that
it shares, it waits for them (`shared_prompts`).

What is left after that goes to requests whose adapter still arrives: their prompts are computed as far as
its layers are here (`early_prefills`). They are never in the way: if a request that could start lacks a row,
blocks or a slot that they hold, they go back to the queue.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.early_prefills import EarlyPrefills
from adaptermesh.worker.engine.fairness import TenantCounters
from adaptermesh.worker.engine.gate import AdapterGate, Placer
from adaptermesh.worker.engine.kv import BlockAllocator
from adaptermesh.worker.engine.sequence import Sequence, SequenceState
from adaptermesh.worker.engine.shared_prompts import PromptsUnderWay
from adaptermesh.worker.engine.slots import BASE_SLOT
from adaptermesh.worker.engine.step_plan import Advance, Row, StepPlan
from adaptermesh.worker.engine.waiting import WaitingQueue


@dataclass(slots=True)
class _Budget:
    """What prompts may still take of a step: tokens, and tokens of prompts that are scored."""

    tokens: int
    scored: int

    def take(self, row: Row) -> None:
        self.tokens -= row.count
        self.scored -= len(row.scores)


class Scheduler:
    """Holds all sequences that have not ended.

    `layers` are those of the base, if its forward can stop between them; 0 if it can't.

    Attributes:
        prefix_query_tokens: Tokens of all prompts that were looked up in the prefix cache.
        prefix_hit_tokens: Those of them that it had.
    """

    def __init__(self, config: EngineConfig, blocks: BlockAllocator, placer: Placer, layers: int = 0) -> None:
        self._config = config
        self._blocks = blocks
        self._placer = placer
        self._counters = TenantCounters(config)
        self._early = EarlyPrefills(min(config.early_tokens, config.step_tokens), layers, blocks, placer)
        self.waiting = WaitingQueue(config, self._counters)
        self.running: list[Sequence] = []
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._misfits: list[Sequence] = []

    def take_misfits(self) -> list[Sequence]:
        """Waiting requests that don't fit with their adapters' virtual tokens; each is given out once."""
        misfits, self._misfits = self._misfits, []
        return misfits

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        if self._counters.full():
            self._counters.forget({*self.waiting.tenants, *(row.request.tenant for row in self.running)})
        self.waiting.add(sequence)

    def plan(self) -> StepPlan:
        """Chooses the rows of the next step and gives them their blocks and slots."""
        self._catch_up()
        decodes, preempted = self._plan_decodes()
        for decode in decodes:
            self._charge(decode)
        budget = _Budget(self._config.step_tokens - len(decodes), self._config.scored_tokens)
        gave_way = not preempted and budget.tokens > 0 and self._give_way()
        advances = self._early.plan(self._early.opened, budget.tokens)
        budget.tokens -= sum(advance.tokens for advance in advances)
        prefills: list[Row] = []
        for sequence in self.running:
            if sequence.pending > 1 and budget.tokens > 0 and not sequence.early:
                row = self._chunk(sequence, budget)
                if row is not None:
                    prefills.append(row)
        if not preempted:
            self._admit(prefills, budget, early=not gave_way)
            advances += self._open_early(budget.tokens)
            self._stage_ahead()
        ordinary = any(not sequence.early for sequence in self.running)
        if ordinary and not (decodes or prefills or advances):
            # Prompts alone fill the cache: one of them starts anew later.
            self._preempt(self._victim(self.running))
        return StepPlan(tuple(_by_slot(decodes)), tuple(_by_slot(prefills)), tuple(advances))

    def book(self, rows: Iterable[Row]) -> None:
        """Books what was computed; blocks that it has filled can be shared from now on."""
        size = self._blocks.block_tokens
        for row in rows:
            sequence = row.sequence
            sequence.scored += len(row.scores)
            sequence.computed += row.count
            sequence.fill_from = None
            full = sequence.computed // size
            if self._config.prefix_cache and full > sequence.table.kept:
                self._blocks.keep(sequence.table, sequence.keys.first(full, sequence.tokens, size))

    def book_advance(self, advance: Advance) -> None:
        """Books the layers that were computed; after the last ones the rows are like any others."""
        early = advance.early
        early.done = advance.until
        if not advance.finishes:
            return
        self._early.close(early)
        for row in early.rows:
            row.sequence.early = False
            self._counters.charge(row.sequence.request.tenant, 0, int(row.samples))
        self.book(early.rows)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence in whatever state it is, and frees all that it holds."""
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.ENDED

    # Early prefills.

    def _catch_up(self) -> None:
        """Rows whose adapter has become whole without them being in an early prefill are like any others."""
        for sequence in self.running:
            if sequence.early and not self._early.is_open(sequence.digest):
                sequence.early = self._arrives(sequence)

    def _arrives(self, sequence: Sequence) -> bool:
        """Whether a sequence's adapter is not whole yet."""
        return sequence.digest is not None and self._placer.arrived(sequence.digest) is not None

    def _give_way(self) -> bool:
        """Rows whose adapter still arrives leave if a request that could start lacks what they hold."""
        early = [sequence for sequence in self.running if sequence.early and self._arrives(sequence)]
        if not early or not any(self._is_blocked(sequence) for sequence in self.waiting.in_order()):
            return False
        digest = self._victim(early).digest
        for sequence in early:
            if sequence.digest == digest:
                self._preempt(sequence)
        return True

    def _is_blocked(self, sequence: Sequence) -> bool:
        """Whether a request whose adapter is whole lacks a row, blocks, a slot or a place in the step."""
        if self._arrives(sequence) or not self._knows(sequence):
            return False
        if len(self.running) >= self._config.max_batch_rows or not self._has_room(sequence):
            return True
        digest, limit = sequence.digest, self._config.max_step_adapters
        if digest is None:
            return False
        adapters = {row.digest for row in self.running} - {None}
        crowded = bool(limit) and len(adapters) >= limit and digest not in adapters
        return crowded or (self._placer.waits_for_slot(digest) and not self._placer.has_slot(digest))

    def _admit_early(self, sequences: Iterable[Sequence], gate: AdapterGate) -> None:
        """Lets requests join whose adapter's first layers are here, after all those that are ready."""
        room = self._early.room
        for sequence in sequences:
            if room <= 0 or len(self.running) >= self._config.max_batch_rows:
                return
            digest = sequence.digest
            if digest is None or self._early.is_open(digest) or not self._placer.arrived(digest):
                continue
            if sequence.unscored:
                # The logits of all its tokens would be wanted; it comes when its adapter is whole.
                continue
            if not self._knows(sequence) or sequence.given:
                # What is given of every layer has to be in the cache before the first token is computed.
                continue
            if not self._has_room(sequence):
                return
            slot = gate.place_early(digest)
            if slot is not None:
                sequence.slot, sequence.early = slot, True
                self._join(sequence)
                room -= sequence.pending

    def _open_early(self, budget: int) -> list[Advance]:
        """Opens early prefills for the rows that are in none, and gives the first step of each."""
        opened = self._early.open_for(sequence for sequence in self.running if sequence.early)
        for early in opened:
            for row in early.rows:
                self._charge(row, output=0)
        return self._early.plan(opened, budget)

    def _stage_ahead(self) -> None:
        """Gives an empty slot to the first waiting adapter that only lacks one; one a step."""
        if not len(self.waiting) or not self._placer.empty_slots:
            return
        # The next ones to run: looking through a long queue in every step would cost more than it gives.
        most = max(self._config.max_batch_rows, self._config.device_slots)
        for sequence in islice(self.waiting.in_order(), most):
            if sequence.digest is not None and self._placer.waits_for_slot(sequence.digest):
                self._placer.stage_ahead(sequence.digest)
                return

    # Rows.

    def _plan_decodes(self) -> tuple[list[Row], bool]:
        """One token for each running row; the least urgent ones give way when blocks run out."""
        preempted = False
        for sequence in list(self.running):
            if sequence.state is not SequenceState.RUNNING or not sequence.decodes:
                continue
            while not self._blocks.grow(sequence.table, sequence.computed + 1):
                preempted = True
                victim = self._victim(self.running)
                self._preempt(victim)
                if victim is sequence:
                    break
        return [Row(sequence, 1) for sequence in self.running if sequence.decodes], preempted

    def _chunk(self, sequence: Sequence, budget: _Budget) -> Row | None:
        """As many tokens of a prompt as the budget and the blocks allow, which it takes."""
        count = min(budget.tokens, sequence.pending)
        if sequence.unscored:
            told = max(0, sequence.virtual + sequence.scored - 1 - sequence.computed)
            count = min(count, told + budget.scored)
        if not count or not self._blocks.grow(sequence.table, sequence.computed + count):
            return None
        row = Row(sequence, count)
        budget.take(row)
        self._charge(row)
        return row

    def _charge(self, row: Row, output: int | None = None) -> None:
        """Books what the row costs its tenant: each prompt token once, and the token that it samples."""
        sequence = row.sequence
        end = min(sequence.computed + row.count, sequence.virtual + sequence.prompt_tokens)
        fresh = max(0, end - max(sequence.computed, sequence.charged))
        sequence.charged = max(sequence.charged, end)
        sampled = int(row.samples) if output is None else output
        self._counters.charge(sequence.request.tenant, fresh, sampled)

    def _admit(self, prefills: list[Row], budget: _Budget, *, early: bool) -> None:
        """Lets waiting requests join while rows, tokens, blocks and slots last.

        `early`: those whose adapter still arrives, too.
        """
        if not len(self.waiting) or budget.tokens <= 0 or len(self.running) >= self._config.max_batch_rows:
            return
        passed: list[tuple[Sequence, int]] = []
        joined = 0
        gate = AdapterGate(self._config, self._placer, self.running, self.waiting.starving)
        under_way = PromptsUnderWay(filter(self._fills_cache, self.running), self._blocks.block_tokens)
        for sequence in self.waiting.in_order():
            if budget.tokens <= 0 or len(self.running) >= self._config.max_batch_rows:
                break
            if sequence.unscored and budget.scored <= 0:
                # It would hold a row and do nothing until the prompts before it are scored.
                continue
            if not self._knows(sequence) and sequence.traits is not None:
                # It leaves before the next step.
                continue
            if self._looks_up(sequence) and under_way.shares(sequence):
                # In a step or two it finds them in the cache.
                continue
            if not self._has_room(sequence):
                # Nobody passes a request that lacks memory: the small ones would starve it.
                early = False
                break
            if not self._place(sequence, gate):
                passed.append((sequence, joined))
                continue
            self._join(sequence)
            joined += 1
            if self._fills_cache(sequence):
                under_way.add(sequence)
            row = self._chunk(sequence, budget)
            if row is not None:
                prefills.append(row)
        for sequence, before in passed:
            self.waiting.overtake(sequence, joined - before)
        if early:
            self._admit_early([sequence for sequence, _ in passed], gate)

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
        tokens = sequence.length + 1
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
        return sequence.keys.first((sequence.length - 1) // size, sequence.tokens, size)

    def _looks_up(self, sequence: Sequence) -> bool:
        # Cached blocks have no logits: a prompt that is not scored yet is computed, all of it.
        wanted = self._config.prefix_cache and sequence.request.reuse_prefix and not sequence.unscored
        return wanted and self._knows(sequence)

    def _knows(self, sequence: Sequence) -> bool:
        """Whether the adapter's manifest is here, and the sequence fits with what that adds to it.

        Without the manifest it is open whose keys the blocks have.
        """
        if sequence.traits is None and sequence.digest is not None:
            traits = self._placer.traits(sequence.digest)
            if traits is not None:
                sequence.learn(traits)
                if not sequence.fits:
                    self._misfits.append(sequence)
        return sequence.traits is not None and sequence.fits

    def _fills_cache(self, sequence: Sequence) -> bool:
        """Whether a row computes its prompt for the cache, in steps."""
        return self._config.prefix_cache and not sequence.early

    def _share_prefix(self, sequence: Sequence) -> None:
        sequence.begin(self._blocks.share(sequence.table, self._reusable(sequence)))
        if sequence.timeline.scheduled_ns == 0 and self._looks_up(sequence):
            # After a preemption it would find its own tokens, which says nothing about shared prefixes.
            cached = max(0, sequence.computed - sequence.virtual)
            sequence.timeline.cached_tokens = cached
            self.prefix_hit_tokens += cached
            self.prefix_query_tokens += len(sequence.tokens)

    def _join(self, sequence: Sequence) -> None:
        if not self._knows(sequence):
            raise MeshError(
                Code.INTERNAL, Reason.INTERNAL, f"adapter {sequence.digest} has a slot and no manifest"
            )
        self._share_prefix(sequence)
        self.waiting.join(sequence)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def _victim(self, sequences: Iterable[Sequence]) -> Sequence:
        """The row that gives way: of the lowest priority, and the last of these to come."""
        return min(sequences, key=lambda row: (row.level, -row.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a row out of the batch; it waits in its old place and computes its tokens anew."""
        self._leave(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.early:
            self._early.drop(sequence)
            sequence.early = False
        self._blocks.release(sequence.table)
        sequence.begin(0)
        sequence.slot = BASE_SLOT
        if sequence.digest is not None:
            self._placer.unplace(sequence.digest)


def _by_slot(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.sequence.slot, row.sequence.arrival))
