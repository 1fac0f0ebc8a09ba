"""Attention that reads the paged cache where it lies: one way for decodes and prefill chunks together.

A step is described once, in one tensor: where each row's queries begin, how many keys it sees, and its block
table. What computes is a `PagedWay`: torch's (`paged_varlen`), a Triton kernel (`paged_triton`) or the plain
twin here. `attention` gathers instead, and serves where none of them runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adaptermesh.worker.engine.attention import ScoreRule, Span
from adaptermesh.worker.engine.kv import PADDING_BLOCK, KvCache
from adaptermesh.worker.engine.upload import to_device


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a step: the first `decodes` have one token each.

    starts: [rows + 1] int32, where each row's tokens begin in the batch. used: [rows] int32, the keys that a
    row sees, its new ones included; 0: none, and its output is 0. table: [rows, width] int32, blocks.
    tiles: [n, 2] int32, row and first token in it, of pieces of at most `tile_tokens` tokens of the rows that
    follow the decodes. most_tokens, most_keys: at least the largest of any row.
    """

    decodes: int
    starts: torch.Tensor
    used: torch.Tensor
    table: torch.Tensor
    tiles: torch.Tensor
    tile_tokens: int
    most_tokens: int
    most_keys: int


class PagedWay(Protocol):
    """Computes attention over pages."""

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: PagedRows,
        rule: ScoreRule,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention of each row's tokens, which are the last ones of its keys.

        q: [tokens, heads, d]. keys, values: [pages, page tokens, kv_heads, d]. Returns [tokens, heads, d].
        Nothing is read of a page but the keys that a row sees.
        """
        ...


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """A step's attention over pages; the contract is that of `AttentionPlan.attend`.

    places: [tokens] int64: where each token's keys and values go.
    """

    way: PagedWay
    rows: PagedRows
    places: torch.Tensor

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
        """Stores the new keys and values, then attends. See `AttentionPlan.attend`."""
        cache.write(layer, self.places, kv)
        rule = ScoreRule(scaling, softcap)
        return self.way(q, cache.keys(layer), cache.values(layer), self.rows, rule, window).flatten(1)


def plan_paged(
    spans: Sequence[Span],
    decodes: int,
    way: PagedWay,
    block_tokens: int,
    tile_tokens: int,
    device: torch.device,
) -> PagedPlan:
    """Plans a step. The first `decodes` spans have one token each; the spans' tokens are packed in order."""
    starts, places, tiles, table = [0], list[int](), list[int](), list[int]()
    width = max(len(span.blocks) for span in spans)
    for row, span in enumerate(spans):
        starts.append(starts[-1] + span.count)
        places.extend(token_places(span, block_tokens))
        table.extend((*span.blocks, *[PADDING_BLOCK] * (width - len(span.blocks))))
        if row >= decodes:
            tiles.extend(part for first in range(0, span.count, tile_tokens) for part in (row, first))
    used = [span.past + span.count for span in spans]
    packed = to_device(torch.tensor([*starts, *used, *places, *tiles, *table], dtype=torch.int32), device)
    parts = packed.split([len(starts), len(used), len(places), len(tiles), len(table)])
    rows = PagedRows(
        decodes=decodes,
        starts=parts[0],
        used=parts[1],
        table=parts[4].view(len(spans), width),
        tiles=parts[3].view(-1, 2),
        tile_tokens=tile_tokens,
        most_tokens=max(span.count for span in spans),
        most_keys=max(used),
    )
    return PagedPlan(way, rows, parts[2].long())


def token_places(span: Span, block_tokens: int) -> list[int]:
    """Where the new tokens of a span go: block * block_tokens + offset."""
    return [
        span.blocks[position // block_tokens] * block_tokens + position % block_tokens
        for position in range(span.past, span.past + span.count)
    ]


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a prefill tile: with the heads that share a key they make about 64 queries."""
    return max(1, 64 * kv_heads // heads)


def plain_paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> torch.Tensor:
    """The twin of the fast ways: row by row, in float32."""
    out = torch.zeros_like(q)
    starts, used = rows.starts.tolist(), rows.used.tolist()
    for row, seen in enumerate(used):
        start, end = starts[row], starts[row + 1]
        if seen == 0:
            continue
        blocks = rows.table[row, : -(-seen // keys.shape[1])]
        shared = q.shape[1] // keys.shape[2]
        # [heads, keys, d], each key's head repeated for the heads that share it.
        k, v = (
            part[blocks].flatten(0, 1)[:seen].transpose(0, 1).repeat_interleave(shared, 0).float()
            for part in (keys, values)
        )
        scores = q[start:end].transpose(0, 1).float() @ k.transpose(1, 2) * rule.scaling
        if rule.softcap is not None:
            scores = torch.tanh(scores / rule.softcap) * rule.softcap
        at = torch.arange(seen - (end - start), seen, device=q.device)[:, None]
        key = torch.arange(seen, device=q.device)[None, :]
        hidden = (key > at) if window is None else (key > at) | (key <= at - window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = (weights @ v).transpose(0, 1).to(q.dtype)
    return out
