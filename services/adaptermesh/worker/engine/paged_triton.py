"""Paged attention in Triton: one program for each piece of a row and each head of keys.

The heads that share a key are rows of one tile, so each key and value is read once for all of them. The
softmax is computed on line, in float32. Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1; of the
pages: PagedAttention (arXiv:2309.06180), section 4. A row's keys are not split over programs: few rows with
very long contexts leave a card partly idle.
"""

import torch
import triton
import triton.language as tl

from adaptermesh.worker.engine.attention import ScoreRule
from adaptermesh.worker.engine.paged_attention import PagedRows

_MOST_KEYS = 64
_TILE_BYTES = 16384
"""Of the keys that a program holds at once; several such tiles have to fit into a processor's memory."""
_LEAST_QUERIES = 16
"""The smallest tile that a matrix product takes."""
_ANYTHING = ["starts", "used", "table", "tiles", "table_stride", "window"]
"""These differ from step to step: a kernel for each alignment would be compiled anew."""
_FACTORS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=_ANYTHING)
def _attend(
    q,
    keys,
    values,
    out,
    starts,
    used,
    table,
    tiles,
    scaling,
    softcap,
    window,
    q_token,
    q_head,
    out_token,
    page_stride,
    key_stride,
    head_stride,
    table_stride,
    SHARED: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    TILED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Up to TOKENS tokens of one row with the SHARED heads of one key's head. Grid: (tiles, kv heads)."""
    row, first = tl.program_id(0), 0
    if TILED:
        row, first = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    begin, seen = tl.load(starts + row), tl.load(used + row)
    count = tl.load(starts + row + 1) - begin
    past = seen - count
    at = tl.arange(0, QUERIES)
    token, head = first + at // SHARED, tl.program_id(1) * SHARED + at % SHARED
    live = (at < TOKENS * SHARED) & (token < count)
    position = past + token
    dims = tl.arange(0, WIDTH)
    part = dims < DIM
    place = (begin + token).to(tl.int64)
    queries = tl.load(
        q + place[:, None] * q_token + head[:, None] * q_head + dims[None, :],
        mask=live[:, None] & part[None, :],
        other=0.0,
    ).to(FACTOR)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    norm = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES, WIDTH], tl.float32)
    low = 0
    if WINDOWED:
        low = tl.maximum(past + first + 1 - window, 0) // KEYS * KEYS
    high = tl.minimum(seen, past + first + TOKENS)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < high
        page = tl.load(table + row * table_stride + key // PAGE, mask=inside, other=0).to(tl.int64)
        where = page * page_stride + (key % PAGE) * key_stride + tl.program_id(1) * head_stride
        k = tl.load(
            keys + where[None, :] + dims[:, None], mask=inside[None, :] & part[:, None], other=0.0
        ).to(FACTOR)
        scores = tl.dot(queries, k, input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        visible = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen no key yet: minus infinity less minus infinity would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        norm = norm * fade + tl.sum(weights, 1)
        v = tl.load(
            values + where[:, None] + dims[None, :], mask=inside[:, None] & part[None, :], other=0.0
        ).to(FACTOR)
        total = tl.dot(weights.to(FACTOR), v, total * fade[:, None], input_precision="ieee")
        top = higher
    total = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    target = out + place[:, None] * out_token + head[:, None] * DIM + dims[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & part[None, :])


def triton_paged(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> torch.Tensor:
    """The `PagedWay` of this kernel: one launch for the decodes, one for the prefill chunks."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows.decodes:
        _launch(rows.decodes, 1, False, out, q, keys, values, rows, rule, window)
    if rows.tiles.shape[0]:
        _launch(rows.tiles.shape[0], rows.tile_tokens, True, out, q, keys, values, rows, rule, window)
    return out


def _launch(
    tiles: int,
    tokens: int,
    tiled: bool,
    out: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    rule: ScoreRule,
    window: int | None,
) -> None:
    _, heads, dim = q.shape
    _, page, kv_heads, _ = keys.shape
    shared = heads // kv_heads
    width = max(_LEAST_QUERIES, triton.next_power_of_2(dim))
    _attend[(tiles, kv_heads)](
        q,
        keys,
        values,
        out,
        rows.starts,
        rows.used,
        rows.table,
        rows.tiles,
        rule.scaling,
        1.0 if rule.softcap is None else rule.softcap,
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        rows.table.stride(0),
        SHARED=shared,
        TOKENS=tokens,
        QUERIES=max(_LEAST_QUERIES, triton.next_power_of_2(tokens * shared)),
        DIM=dim,
        WIDTH=width,
        PAGE=page,
        KEYS=min(_MOST_KEYS, _TILE_BYTES // (width * q.element_size())),
        TILED=tiled,
        CAPPED=rule.softcap is not None,
        WINDOWED=window is not None,
        # Triton's interpreter multiplies the bit patterns of bfloat16 as integers.
        FACTOR=_FACTORS[q.dtype] if q.is_cuda else tl.float32,
    )
