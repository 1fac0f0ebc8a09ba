"""The low-rank kernels in Triton: shrink (x A) and expand (+= B), by token and by tile of tokens.

Every program reads the rank rows of its own token or tile only and ends at once where there are none; sums
are in float32. The constants were chosen on paper for a Hopper card and wait for a measurement.
"""

import torch
import triton
import triton.language as tl

from adaptermesh.worker.engine.ops.lowrank_spans import TILE_TOKENS, TokenSpans

_SHRINK_ROWS = 4
"""Rank rows of one token's program: few, for a long input keeps a program busy."""
_SHRINK_COLUMNS = 512
_EXPAND_ROWS = 16
_EXPAND_COLUMNS = 256
_TILE_ROWS = 16
_TILE_COLUMNS = 128
_ANYWHERE = ["singles", "tiles", "spans"]
"""These lie anywhere in the step's one tensor: a kernel for each alignment would be compiled anew."""
_FACTORS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=_ANYWHERE)
def _shrink_tokens(
    x, a, scales, inner, singles, spans, width, x_stride, a_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """inner[place + r] = scale[r] * sum_k x[token, k] A[start + r, k]. Grid: (singles, rank blocks)."""
    token = tl.load(singles + tl.program_id(0)).to(tl.int64)
    start = tl.load(spans + token * 3).to(tl.int64)
    rank = tl.load(spans + token * 3 + 1)
    place = tl.load(spans + token * 3 + 2)
    if tl.program_id(1) * ROWS < rank:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        own = rows < rank
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, width, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            inside = columns < width
            part = tl.load(x + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            weights = tl.load(
                a + (start + rows)[:, None] * a_stride + columns[None, :],
                mask=own[:, None] & inside[None, :],
                other=0.0,
            )
            total += part[None, :] * weights.to(tl.float32)
        scale = tl.load(scales + start + rows, mask=own, other=0.0).to(tl.float32)
        tl.store(inner + place + rows, tl.sum(total, 1) * scale, mask=own)


@triton.jit(do_not_specialize=_ANYWHERE)
def _expand_tokens(
    inner, b, y, singles, spans, width, b_stride, y_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y[token, c] += sum_r inner[place + r] B[start + r, c]. Grid: (singles, column blocks)."""
    token = tl.load(singles + tl.program_id(0)).to(tl.int64)
    start = tl.load(spans + token * 3).to(tl.int64)
    rank = tl.load(spans + token * 3 + 1)
    place = tl.load(spans + token * 3 + 2)
    if rank > 0:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        total = tl.zeros([COLUMNS], tl.float32)
        for r in range(0, rank, ROWS):
            rows = r + tl.arange(0, ROWS)
            own = rows < rank
            part = tl.load(inner + place + rows, mask=own, other=0.0)
            weights = tl.load(
                b + (start + rows)[:, None] * b_stride + columns[None, :],
                mask=own[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(part[:, None] * weights.to(tl.float32), 0)
        target = y + token * y_stride + columns
        before = tl.load(target, mask=inside, other=0.0)
        tl.store(target, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=_ANYWHERE)
def _shrink_tiles(
    x,
    a,
    scales,
    inner,
    tiles,
    spans,
    width,
    x_stride,
    a_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The same for a tile of tokens with the same rows, as a matrix product. Grid: (tiles, rank blocks)."""
    first = tl.load(tiles + tl.program_id(0) * 2).to(tl.int64)
    count = tl.load(tiles + tl.program_id(0) * 2 + 1)
    start = tl.load(spans + first * 3).to(tl.int64)
    rank = tl.load(spans + first * 3 + 1)
    place = tl.load(spans + first * 3 + 2)
    if tl.program_id(1) * ROWS < rank:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        own = rows < rank
        at = tl.arange(0, TOKENS)
        live = at < count
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for k in range(0, width, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            inside = columns < width
            part = tl.load(
                x + (first + at)[:, None] * x_stride + columns[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            weights = tl.load(
                a + (start + rows)[None, :] * a_stride + columns[:, None],
                mask=own[None, :] & inside[:, None],
                other=0.0,
            )
            total = tl.dot(part.to(FACTOR), weights.to(FACTOR), total, input_precision="ieee")
        scale = tl.load(scales + start + rows, mask=own, other=0.0).to(tl.float32)
        tl.store(
            inner + place + at[:, None] * rank + rows[None, :],
            total * scale[None, :],
            mask=live[:, None] & own[None, :],
        )


@triton.jit(do_not_specialize=_ANYWHERE)
def _expand_tiles(
    inner,
    b,
    y,
    tiles,
    spans,
    width,
    b_stride,
    y_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The same for a tile of tokens with the same rows, as a matrix product. Grid: (tiles, column blocks)."""
    first = tl.load(tiles + tl.program_id(0) * 2).to(tl.int64)
    count = tl.load(tiles + tl.program_id(0) * 2 + 1)
    start = tl.load(spans + first * 3).to(tl.int64)
    rank = tl.load(spans + first * 3 + 1)
    place = tl.load(spans + first * 3 + 2)
    if rank > 0:
        at = tl.arange(0, TOKENS)
        live = at < count
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for r in range(0, rank, ROWS):
            rows = r + tl.arange(0, ROWS)
            own = rows < rank
            weights = tl.load(
                b + (start + rows)[:, None] * b_stride + columns[None, :],
                mask=own[:, None] & inside[None, :],
                other=0.0,
            )
            part = tl.load(
                inner + place + at[:, None] * rank + rows[None, :],
                mask=live[:, None] & own[None, :],
                other=0.0,
            )
            total = tl.dot(part.to(FACTOR), weights.to(FACTOR), total, input_precision="ieee")
        target = y + (first + at)[:, None] * y_stride + columns[None, :]
        mask = live[:, None] & inside[None, :]
        before = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (before.to(tl.float32) + total).to(before.dtype), mask=mask)


def triton_product(
    tokens: TokenSpans,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """The `SpanProduct` of these kernels. x and y are contiguous along their last dimension."""
    narrow, wide, (singles, tiles) = x.shape[1], y.shape[1], (tokens.singles.shape[0], tokens.tiles.shape[0])
    if tokens.max_rank == 0:
        return
    if singles:
        _shrink_tokens[(singles, triton.cdiv(tokens.max_rank, _SHRINK_ROWS))](
            x,
            a,
            scales,
            tokens.inner,
            tokens.singles,
            tokens.spans,
            narrow,
            x.stride(0),
            a.stride(1),
            ROWS=_SHRINK_ROWS,
            COLUMNS=_SHRINK_COLUMNS,
        )
        _expand_tokens[(singles, triton.cdiv(wide, _EXPAND_COLUMNS))](
            tokens.inner,
            b,
            y,
            tokens.singles,
            tokens.spans,
            wide,
            b.stride(0),
            y.stride(0),
            ROWS=_EXPAND_ROWS,
            COLUMNS=_EXPAND_COLUMNS,
        )
    if tiles:
        sizes = {
            "TOKENS": TILE_TOKENS,
            "ROWS": _TILE_ROWS,
            "COLUMNS": _TILE_COLUMNS,
            # Triton's interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16 as integers.
            "FACTOR": _FACTORS[x.dtype] if x.is_cuda else tl.float32,
        }
        _shrink_tiles[(tiles, triton.cdiv(tokens.max_rank, _TILE_ROWS))](
            x, a, scales, tokens.inner, tokens.tiles, tokens.spans, narrow, x.stride(0), a.stride(1), **sizes
        )
        _expand_tiles[(tiles, triton.cdiv(wide, _TILE_COLUMNS))](
            tokens.inner, b, y, tokens.tiles, tokens.spans, wide, b.stride(0), y.stride(0), **sizes
        )
