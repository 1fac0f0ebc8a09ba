"""Attention over the paged cache, for a packed batch of decodes and prefill chunks.

Decodes come first, one token a row. They are computed together: their blocks are gathered into one padded
tensor and all rows go through one call a layer. Rows of very different lengths are split into groups, so that
one long context doesn't pad all others. On the CPU the gather costs about 15 % over attending in place at 100
tokens of context; one call for each row costs two to three times as much.

Prefill chunks follow, one call each. A chunk at the start of its sequence needs no gather: its keys are those
that were just computed.

Layers may differ: some attend over a window of the last tokens only, some cap their scores. A step keeps one
reach (blocks and masks) for each distinct window, made when the first layer asks for it; a window's reach
gathers only the blocks that lie in it. Scores that are capped are computed explicitly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from adaptermesh.worker.engine.kv import PADDING_BLOCK, KvCache
from adaptermesh.worker.engine.upload import to_device

_GROUP_SLACK = 64


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a step: `count` new ones after `past` cached ones, in its blocks."""

    past: int
    count: int
    blocks: tuple[int, ...]


class StepAttention(Protocol):
    """A step's attention; see `AttentionPlan.attend` for the contract."""

    def attend(
        self,
        cache: KvCache,
        layer: int,
        q: torch.Tensor,
        kv: torch.Tensor,
        scaling: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows that attend together.

    rows: [n] int64, or None for all decodes in order. blocks: [n * blocks per row] int64.
    bias: [n, 1, 1, keys], 0 or minus infinity.
    """

    count: int
    rows: torch.Tensor | None
    blocks: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, end) of the batch, and `keys` tokens that they look at, themselves included.

    `blocks` None: nothing is cached before them. bias: [tokens, keys], 0 or minus infinity; None is causal.
    """

    start: int
    end: int
    keys: int
    blocks: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Reach:
    """What each row of a step sees."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """How a layer makes scores of products: times `scaling`, then within +-`softcap` unless None."""

    scaling: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Everything that attention needs in a step. Built once, used by each layer.

    places: [tokens] int64: where each token's keys and values go, block * block_tokens + offset.
    `longest` is the longest sequence of the step, in tokens. `reaches` has those made so far, by window.
    """

    spans: tuple[Span, ...]
    decodes: int
    block_tokens: int
    dtype: torch.dtype
    places: torch.Tensor
    longest: int
    reaches: dict[int | None, Reach] = field(default_factory=dict)

    def attend(
        self,
        cache: KvCache,
        layer: int,
        q: torch.Tensor,
        kv: torch.Tensor,
        scaling: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Stores the new keys and values, then attends.

        q: [tokens, heads, d]. kv: [tokens, 2 * kv_heads, d], keys first. Returns [tokens, heads * d].
        `window`: a token sees itself and the `window` - 1 before it; None is all. `softcap`: scores become
        softcap * tanh(score / softcap). Source: Gemma 2 (arXiv:2408.00118), section 2.
        """
        cache.write(layer, self.places, kv)
        rule, reach = ScoreRule(scaling, softcap), self.reach(window)
        if len(reach.groups) == 1 and not reach.chunks:
            return _decode(cache, layer, q, reach.groups[0], rule).flatten(1)
        out = torch.empty_like(q)
        for group in reach.groups:
            if group.rows is None:
                out[: self.decodes] = _decode(cache, layer, q[: self.decodes], group, rule)
            else:
                part = _decode(cache, layer, q.index_select(0, group.rows), group, rule)
                out.index_copy_(0, group.rows, part)
        for chunk in reach.chunks:
            out[chunk.start : chunk.end] = _prefill(cache, layer, q, kv, chunk, rule)
        return out.flatten(1)

    def reach(self, window: int | None) -> Reach:
        """The reach of a window; that of the whole context where the window holds every sequence."""
        if window is not None and window >= self.longest:
            window = None
        found = self.reaches.get(window)
        if found is None:
            found = self.reaches[window] = _plan_reach(self, window)
        return found


def _decode(cache: KvCache, layer: int, q: torch.Tensor, group: DecodeGroup, rule: ScoreRule) -> torch.Tensor:
    """q: [n, heads, d] -> [n, heads, d]. The heads that share a key take the place of query tokens."""
    kv_heads, dim = cache.shape.kv_heads, cache.shape.head_dim
    found = cache.read(layer, group.blocks, group.count).transpose(1, 2)
    by_key, keys, values = q.view(group.count, kv_heads, -1, dim), found[:, :kv_heads], found[:, kv_heads:]
    if rule.softcap is None:
        out = scaled_dot_product_attention(by_key, keys, values, attn_mask=group.bias, scale=rule.scaling)
    else:
        out = _capped(by_key, keys, values, group.bias, rule.scaling, rule.softcap)
    return out.reshape(group.count, -1, dim)


def _prefill(
    cache: KvCache, layer: int, q: torch.Tensor, kv: torch.Tensor, chunk: PrefillChunk, rule: ScoreRule
) -> torch.Tensor:
    """Returns [chunk's tokens, heads, d]."""
    kv_heads = cache.shape.kv_heads
    if chunk.blocks is None:
        found = kv[chunk.start : chunk.end].transpose(0, 1)
    else:
        found = cache.read(layer, chunk.blocks, 1)[0, : chunk.keys].transpose(0, 1)
    queries, keys, values = q[chunk.start : chunk.end].transpose(0, 1), found[:kv_heads], found[kv_heads:]
    if rule.softcap is not None:
        bias = _band(0, chunk.keys, 0, None, q.dtype, q.device) if chunk.bias is None else chunk.bias
        shared = queries.shape[0] // kv_heads
        by_key = queries.reshape(kv_heads, -1, queries.shape[-1])
        capped = _capped(by_key, keys, values, bias.repeat(shared, 1), rule.scaling, rule.softcap)
        return capped.reshape(queries.shape).transpose(0, 1)
    out = scaled_dot_product_attention(
        queries.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=chunk.bias,
        is_causal=chunk.bias is None and chunk.end - chunk.start > 1,
        scale=rule.scaling,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float, softcap: float
) -> torch.Tensor:
    """q: [..., n, d]. k, v: [..., keys, d]. bias: as wide as the scores. Returns [..., n, d].

    softmax(softcap * tanh(q k' * scaling / softcap) + bias) v, the softmax in float32.
    """
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap)) * softcap + bias
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def plan_attention(
    spans: Sequence[Span], decodes: int, block_tokens: int, dtype: torch.dtype, device: torch.device
) -> AttentionPlan:
    """Plans a step. The first `decodes` spans have one token each; the spans' tokens are packed in order."""
    places = [
        span.blocks[position // block_tokens] * block_tokens + position % block_tokens
        for span in spans
        for position in range(span.past, span.past + span.count)
    ]
    longest = max((span.past + span.count for span in spans), default=0)
    return AttentionPlan(tuple(spans), decodes, block_tokens, dtype, to_device(places, device), longest)


def _plan_reach(plan: AttentionPlan, window: int | None) -> Reach:
    pasts = [span.past for span in plan.spans[: plan.decodes]]
    seen = pasts if window is None else [min(past, window) for past in pasts]
    groups = tuple(_plan_group(plan, rows, window) for rows in _group_rows(seen))
    chunks: list[PrefillChunk] = []
    start = plan.decodes
    for span in plan.spans[plan.decodes :]:
        chunks.append(_plan_chunk(plan, span, start, window))
        start += span.count
    return Reach(groups, tuple(chunks))


def _seen(span: Span, window: int | None, block_tokens: int) -> tuple[int, tuple[int, ...]]:
    """The blocks that hold what a span's tokens see, and the position at which the first one begins."""
    first = 0 if window is None else max(0, span.past + 1 - window) // block_tokens
    last = -(-(span.past + span.count) // block_tokens)
    return first * block_tokens, span.blocks[first:last]


def _group_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Rows whose context is at most twice the shortest one's (and some slack) go together."""
    groups: list[list[int]] = []
    shortest = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not groups or lengths[row] > 2 * shortest + _GROUP_SLACK:
            groups.append([])
            shortest = lengths[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _plan_group(plan: AttentionPlan, rows: list[int], window: int | None) -> DecodeGroup:
    device, block_tokens = plan.places.device, plan.block_tokens
    seen = [_seen(plan.spans[row], window, block_tokens) for row in rows]
    width = max(len(blocks) for _, blocks in seen)
    blocks = [block for _, used in seen for block in (*used, *[PADDING_BLOCK] * (width - len(used)))]
    starts = torch.tensor([start for start, _ in seen])
    last = torch.tensor([plan.spans[row].past for row in rows])[:, None]
    keys = starts[:, None] + torch.arange(width * block_tokens)
    outside = keys > last
    if window is not None:
        outside |= keys <= last - window
    bias = torch.zeros(outside.shape, dtype=plan.dtype).masked_fill_(outside, float("-inf"))
    return DecodeGroup(
        len(rows),
        None if len(rows) == plan.decodes else to_device(rows, device),
        to_device(blocks, device),
        to_device(bias[:, None, None, :], device),
    )


def _plan_chunk(plan: AttentionPlan, span: Span, start: int, window: int | None) -> PrefillChunk:
    device, length = plan.places.device, span.past + span.count
    if span.past == 0 and (window is None or span.count <= window):
        return PrefillChunk(start, start + span.count, length, None, None)
    first, used = _seen(span, window, plan.block_tokens)
    blocks = to_device(used, device) if span.past else None
    bias = _band(span.past, length, first, window, plan.dtype, device)
    return PrefillChunk(start, start + span.count, length - first, blocks, bias)


def _band(
    past: int, length: int, first: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[length - past, length - first]: minus infinity for what a token of [past, length) can't see, or 0."""
    hidden = torch.full((length - past, length - first), float("-inf"), dtype=dtype)
    bias = hidden.triu(past - first + 1)
    if window is not None:
        bias += hidden.tril(past - first - window)
    return to_device(bias, device)
