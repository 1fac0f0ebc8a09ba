"""Runs a plan: packs its rows into tensors, goes through the model once, draws the tokens."""

from collections.abc import Iterable, Iterator

import torch

from adaptermesh.worker.engine.attention import Span, plan_attention
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward.forward import make_forward
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.logprobs import token_logprobs
from adaptermesh.worker.engine.ops.op import Segment, StepTokens
from adaptermesh.worker.engine.postprocess import Drawn
from adaptermesh.worker.engine.sampling import Draw, sample
from adaptermesh.worker.engine.slots import AdapterPlan, DeviceSlots
from adaptermesh.worker.engine.step_plan import Advance, Row, StepPlan


class Runner:
    """The model, the cache's tensor and the slots, seen as one function of a plan."""

    def __init__(self, config: EngineConfig, base: Base, slots: DeviceSlots, blocks: int) -> None:
        self._base = base
        self._slots = slots
        shape = KvShape(base.sites.num_layers, base.kv_heads, base.head_dim, blocks, config.block_tokens)
        self._cache = KvCache(shape, base.dtype, base.device)
        self._forward = make_forward(base, config)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole KV cache."""
        return self._cache.size_bytes

    @property
    def kv_block_bytes(self) -> int:
        return self._cache.block_bytes

    def run(self, plan: StepPlan, fresh_blocks: list[int]) -> list[Drawn]:
        """The tokens drawn for the rows that sample, in their order.

        Raises:
            MeshError: INTERNAL if a row's slot doesn't hold the digest that the request asks for.
        """
        with torch.inference_mode():
            self._cache.zero(fresh_blocks)
            return _drawn(plan.rows, self._forward.run(self.pack(plan), self._cache))

    @property
    def resumable_layers(self) -> int:
        """Layers between which a batch can stop; 0 if it can't."""
        return self._base.sites.num_layers if self._forward.resumable else 0

    def advance(self, advance: Advance, fresh_blocks: list[int]) -> list[Drawn]:
        """The tokens drawn for the rows of an early prefill that sample, in their order, if this finishes it.

        Raises:
            MeshError: INTERNAL if the slot doesn't hold those layers of the digest that is asked for.
        """
        early, plan = advance.early, StepPlan((), advance.early.rows)
        with torch.inference_mode():
            self._cache.zero(fresh_blocks)
            self._slots.check(_wanted(early.rows), advance.until)
            if early.passage is None:
                early.passage = self._forward.start(self._batch(plan), self._cache)
            # Anew each time: the slots' memory may have moved since the last layers.
            early.passage.advance(advance.until, self._adapters(plan))
            return _drawn(early.rows, early.passage.logits()) if advance.finishes else []

    def pack(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan; checks every row's slot."""
        self._slots.check(_wanted(plan.rows))
        return self._batch(plan)

    def _batch(self, plan: StepPlan) -> StepBatch:
        rows, device = plan.rows, self._base.device
        spans = [Span(row.sequence.computed, row.count, tuple(row.sequence.table.blocks)) for row in rows]
        ids: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        for row, span in zip(rows, spans, strict=True):
            end = span.past + span.count
            ids.extend(row.sequence.tokens[span.past : end])
            positions.extend(range(span.past, end))
            if row.samples:
                outputs.append(len(ids) - 1)
        return StepBatch(
            token_ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            outputs=torch.tensor(outputs, dtype=torch.int64, device=device),
            attention=plan_attention(
                spans, len(plan.decodes), self._cache.shape.block_tokens, self._base.dtype, device
            ),
            adapters=self._adapters(plan),
        )

    def _adapters(self, plan: StepPlan) -> AdapterPlan:
        return self._slots.plan(StepTokens(_segments(plan)))


def _wanted(rows: Iterable[Row]) -> Iterator[tuple[int, str | None]]:
    """The slot and the digest of each row."""
    return ((row.sequence.slot, row.sequence.digest) for row in rows)


def _drawn(rows: Iterable[Row], logits: torch.Tensor) -> list[Drawn]:
    """Draws for the rows that sample. logits: [those rows, vocabulary]."""
    draws = [_draw(row) for row in rows if row.samples]
    tokens = sample(logits, draws)
    logprobs = token_logprobs(logits, tokens, [draw.params for draw in draws])
    return [Drawn(*drawn) for drawn in zip(tokens, logprobs, strict=True)]


def _segments(plan: StepPlan) -> tuple[Segment, ...]:
    """Tokens of the same slot that follow one another, decodes and prefills apart."""
    segments: list[Segment] = []
    start = 0
    for part in (plan.decodes, plan.prefills):
        first = len(segments)
        for row in part:
            end, slot = start + row.count, row.sequence.slot
            if len(segments) > first and segments[-1].slot == slot:
                segments[-1] = Segment(slot, segments[-1].start, end)
            else:
                segments.append(Segment(slot, start, end))
            start = end
    return tuple(segments)


def _draw(row: Row) -> Draw:
    sequence = row.sequence
    history = None if sequence.history is None else sequence.history.catch_up(sequence.tokens)
    return Draw(sequence.request.sampling, sequence.seed, len(sequence.tokens), history)
