"""Runs a plan: packs its rows into tensors, goes through the model once, draws the tokens."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.worker.engine.attention import Span
from adaptermesh.worker.engine.attention_choice import AttentionFacts, choose_attention
from adaptermesh.worker.engine.base import Base
from adaptermesh.worker.engine.batch import HostStep, StepBatch
from adaptermesh.worker.engine.config import EngineConfig
from adaptermesh.worker.engine.forward.forward import Forward, ResumableForward
from adaptermesh.worker.engine.graphs import CudaRecorder, DecodeGraphs, Recorder
from adaptermesh.worker.engine.kv import KvCache, KvShape
from adaptermesh.worker.engine.logprobs import score, token_logprobs
from adaptermesh.worker.engine.ops.op import RowTokens, Segment, StepTokens
from adaptermesh.worker.engine.postprocess import Drawn, Scored, StepResult
from adaptermesh.worker.engine.sampling import Draw, sample
from adaptermesh.worker.engine.slots import DeviceSlots
from adaptermesh.worker.engine.static_step import StaticStep
from adaptermesh.worker.engine.step_plan import Advance, Row, StepPlan
from adaptermesh.worker.engine.upload import to_device
from adaptermesh.worker.engine.virtual import VirtualSpan, VirtualTokens


class Runner:
    """The model, the cache's tensor and the slots, seen as one function of a plan."""

    def __init__(
        self, config: EngineConfig, base: Base, slots: DeviceSlots, blocks: int, forward: Forward
    ) -> None:
        self._base = base
        self._slots = slots
        shape = KvShape(base.sites.num_layers, base.kv_heads, base.head_dim, blocks, config.block_tokens)
        self._cache = KvCache(shape, base.dtype, base.device)
        self._virtual = VirtualTokens(slots, self._cache, heads_apart=forward.heads_apart)
        self._forward = forward
        self._resumable = forward if isinstance(forward, ResumableForward) else None
        text = base.model.config.get_text_config()
        caps = getattr(text, "attn_logit_softcapping", None) is not None
        facts = AttentionFacts(shape, text.num_attention_heads, base.dtype, base.device, caps)
        self._plan_attention = choose_attention(config.attention, facts)
        self._graphs: DecodeGraphs | None = None
        if config.cuda_graphs and base.device.type == "cuda":
            self.record_with(CudaRecorder(), config)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole KV cache."""
        return self._cache.size_bytes

    @property
    def kv_block_bytes(self) -> int:
        return self._cache.block_bytes

    def run(self, plan: StepPlan, fresh_blocks: list[int]) -> StepResult:
        """Draws tokens for the rows that sample and scores the prompts that ask for it.

        Raises:
            MeshError: INTERNAL if a row's slot doesn't hold the digest that the request asks for.
        """
        with torch.inference_mode():
            self._cache.zero(fresh_blocks)
            step = self.pack(plan)
            self._virtual.fill(row.sequence for row in plan.rows)
            logits = self._logits(step)
            drawn = _drawn(plan.rows, logits)
            return StepResult(drawn, _score_prompts(plan, logits[len(drawn) :]))

    @property
    def resumable_layers(self) -> int:
        """Layers between which a batch can stop; 0 if it can't."""
        return 0 if self._resumable is None else self._base.sites.num_layers

    def advance(self, advance: Advance, fresh_blocks: list[int]) -> StepResult:
        """Draws tokens for the rows of an early prefill that sample, if this finishes it.

        Raises:
            MeshError: INTERNAL if the slot doesn't hold those layers of the digest that is asked for.
        """
        forward, early = self._resumable, advance.early
        if forward is None:
            raise MeshError(Code.INTERNAL, Reason.INTERNAL, "this forward can't stop between layers")
        plan = StepPlan((), early.rows)
        with torch.inference_mode():
            self._cache.zero(fresh_blocks)
            self._slots.check(_wanted(early.rows), advance.until)
            if early.passage is None:
                early.passage = forward.start(self._upload(_host_step(plan)), self._cache)
            # Anew each time: the slots' memory may have moved since the last layers.
            adapters = self._slots.plan(_host_step(plan).tokens)
            early.passage.advance(advance.until, adapters)
            return StepResult(_drawn(early.rows, early.passage.logits()) if advance.finishes else ())

    def pack(self, plan: StepPlan) -> HostStep:
        """The step of a plan; checks every row's slot."""
        self._slots.check(_wanted(plan.rows))
        return _host_step(plan)

    def record_with(self, recorder: Recorder, config: EngineConfig) -> None:
        """Makes steps of decodes replays of what `recorder` records; without attention over pages nothing."""
        way, shape = self._plan_attention.way, self._cache.shape
        if way is None:
            return
        tokens = min(
            config.max_context_tokens, self._base.max_context_tokens, shape.blocks * shape.block_tokens
        )
        width = -(-tokens // shape.block_tokens)
        static = StaticStep(config.max_batch_rows, width, way, self._cache, self._base.device)
        self._graphs = DecodeGraphs(
            self._forward, self._cache, self._slots, static, recorder, config.max_graphs
        )

    def _logits(self, step: HostStep) -> torch.Tensor:
        """[rows that sample, vocabulary] float32."""
        if self._graphs is not None:
            logits = self._graphs.run(step)
            if logits is not None:
                return logits
        return self._forward.run(self._upload(step), self._cache)

    def _upload(self, step: HostStep) -> StepBatch:
        device = self._base.device
        packed = to_device([*step.token_ids, *step.positions, *step.outputs], device, torch.int64)
        ids, positions, outputs = packed.split([len(step.token_ids), len(step.positions), len(step.outputs)])
        attention = self._plan_attention(step.spans, step.decodes)
        adapters, virtual = self._slots.plan(step.tokens), self._virtual.rows(step.virtual)
        return StepBatch(ids, positions, outputs, attention, adapters, step.spans, virtual)


def _wanted(rows: Iterable[Row]) -> Iterator[tuple[int, str | None]]:
    """The slot and the digest of each row."""
    return ((row.sequence.slot, row.sequence.digest) for row in rows)


def _host_step(plan: StepPlan) -> HostStep:
    rows = plan.rows
    spans = [Span(row.sequence.computed, row.count, tuple(row.sequence.table.blocks)) for row in rows]
    ids: list[int] = []
    positions: list[int] = []
    outputs: list[int] = []
    scored: list[int] = []
    virtual: list[VirtualSpan] = []
    for row, span in zip(rows, spans, strict=True):
        end, shift, before = span.past + span.count, len(ids) - span.past, row.sequence.virtual
        if row.virtual:
            virtual.append(VirtualSpan(len(ids), row.sequence.slot, span.past, len(row.virtual)))
            ids.extend([0] * len(row.virtual))
        ids.extend(row.sequence.tokens[max(0, span.past - before) : max(0, end - before)])
        positions.extend(range(span.past - row.sequence.shift, end - row.sequence.shift))
        if row.samples:
            outputs.append(len(ids) - 1)
        scored.extend(before + position + shift for position in row.scores)
    return HostStep(
        token_ids=ids,
        positions=positions,
        outputs=outputs + scored,
        spans=tuple(spans),
        slots=tuple(row.parts[-1][0] for row in rows),
        decodes=len(plan.decodes),
        tokens=StepTokens(_segments(plan), _row_tokens(rows), (*outputs, *scored)),
        virtual=tuple(virtual),
    )


def _row_tokens(rows: Sequence[Row]) -> tuple[RowTokens, ...]:
    """Where in their sequences, without virtual tokens, the packed tokens are."""
    ends = itertools.accumulate(row.count for row in rows)
    return tuple(
        RowTokens(
            start=end - row.count + len(row.virtual),
            end=end,
            past=max(0, row.sequence.computed - row.sequence.virtual),
            prompt=row.sequence.prompt_tokens,
        )
        for row, end in zip(rows, ends, strict=True)
    )


def _drawn(rows: Sequence[Row], logits: torch.Tensor) -> tuple[Drawn, ...]:
    """Draws for the rows that sample. logits: [those rows and maybe more, vocabulary]."""
    draws = [_draw(row) for row in rows if row.samples]
    sampled = logits[: len(draws)]
    tokens = sample(sampled, draws)
    logprobs = token_logprobs(sampled, tokens, [draw.params for draw in draws])
    return tuple(Drawn(*one) for one in zip(tokens, logprobs, strict=True))


def _segments(plan: StepPlan) -> tuple[Segment, ...]:
    """Tokens of the same slot that follow one another, decodes and prefills apart.

    What comes before the activation of its adapter is the base's.
    """
    segments: list[Segment] = []
    start = 0
    for part in (plan.decodes, plan.prefills):
        first = len(segments)
        for slot, count in (piece for row in part for piece in row.parts):
            end = start + count
            if len(segments) > first and segments[-1].slot == slot:
                segments[-1] = Segment(slot, segments[-1].start, end)
            else:
                segments.append(Segment(slot, start, end))
            start = end
    return tuple(segments)


def _score_prompts(plan: StepPlan, logits: torch.Tensor) -> tuple[Scored, ...]:
    """logits: [prompt tokens to score, vocabulary], in the order of the rows."""
    rows = [row for row in plan.rows if row.scores]
    if not rows:
        return ()
    tokens = [row.sequence.tokens[position + 1] for row in rows for position in row.scores]
    counts = [row.sequence.request.sampling.prompt_logprobs or 0 for row in rows for _ in row.scores]
    left = iter(score(logits, tokens, counts))
    return tuple(Scored(row.sequence, tuple(itertools.islice(left, len(row.scores)))) for row in rows)


def _draw(row: Row) -> Draw:
    sequence = row.sequence
    history = None if sequence.history is None else sequence.history.catch_up(sequence.tokens)
    return Draw(sequence.request.sampling, sequence.seed, len(sequence.tokens), history)
