"""What a step computes."""

from dataclasses import dataclass

from adaptermesh.worker.engine.forward.passage import Passage
from adaptermesh.worker.engine.sequence import Sequence, SequenceState
from adaptermesh.worker.engine.slots import BASE_SLOT


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of one sequence, from its first one that is not computed."""

    sequence: Sequence
    count: int

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The slots that compute it and how many tokens each: the base before the activation, if at all."""
        sequence = self.sequence
        before = min(sequence.activation - sequence.computed, self.count)
        if before <= 0:
            return ((sequence.slot, self.count),)
        adapted = self.count - before
        return ((BASE_SLOT, before), (sequence.slot, adapted)) if adapted else ((BASE_SLOT, before),)

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the last one known: its logits give the next one."""
        return self.count == self.sequence.pending

    @property
    def scores(self) -> range:
        """Places in the prompt of those of its tokens whose logits say how likely the next one is."""
        sequence = self.sequence
        computed = sequence.computed - sequence.virtual
        if not sequence.unscored:
            return range(0)
        # After a preemption the prompt is computed anew, but nothing is told twice.
        start = max(computed, sequence.scored - 1)
        return range(start, max(start, min(computed + self.count, sequence.prompt_tokens - 1)))

    @property
    def virtual(self) -> range:
        """The virtual tokens among its tokens."""
        sequence = self.sequence
        return range(sequence.computed, min(sequence.computed + self.count, sequence.virtual))


@dataclass(slots=True, eq=False)
class EarlyPrefill:
    """The first chunks of an adapter's rows, computed layer by layer while the adapter still arrives.

    Attributes:
        done: Layers that are computed.
        is_open: False once it was finished or dropped.
        passage: What the runner keeps of it between two steps; None before the first one.
    """

    digest: str
    rows: tuple[Row, ...]
    done: int = 0
    is_open: bool = True
    passage: Passage | None = None

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class Advance:
    """A step's part of an early prefill: its layers up to `until`, and then the logits if it `finishes`.

    `tokens` is what it takes of the step's budget: a token through some of the layers is a part of one.
    """

    early: EarlyPrefill
    until: int
    finishes: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of a step: decodes first, both parts sorted by slot with the base in front; early prefills."""

    decodes: tuple[Row, ...]
    prefills: tuple[Row, ...]
    advances: tuple[Advance, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.decodes + self.prefills

    @property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows) + sum(advance.tokens for advance in self.advances)

    def without_ended(self) -> "StepPlan":
        """The plan less the sequences that have ended since it was made."""
        kept = [
            tuple(row for row in rows if row.sequence.state is SequenceState.RUNNING)
            for rows in (self.decodes, self.prefills)
        ]
        return StepPlan(
            kept[0], kept[1], tuple(advance for advance in self.advances if advance.early.is_open)
        )
