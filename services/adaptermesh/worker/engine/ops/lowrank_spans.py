"""Low-rank products by kernels: which rank rows each token has, as one tensor for the whole step.

A kernel gets a site's whole arena and, for each token, where its rows begin and how many they are; no token
meets another's rows, nothing is padded to the largest rank. Tokens of short segments (decodes) are computed
one by one, those of long ones (prefills) in tiles that share their rows. Source of both forms: Punica
(arXiv:2310.18547), section 4: BGMV and SGMV.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from adaptermesh.worker.engine.ops.op import Segment, SitePlan, StepTokens
from adaptermesh.worker.engine.upload import to_device

TILE_TOKENS = 16
"""Tokens of a tile; a segment shorter than this is computed token by token."""
_TOLERANCE = 5e-2
SPAN_FIELDS = 3
"""First row, rank, place in the inner product."""

log = logging.getLogger(__name__)

Rows = tuple[int, int]
"""First rank row and the one behind the last."""


class ArenaRows(Protocol):
    """A site's arena. By layer: a is [in, rows] (transposed), b is [rows, out], scales is [rows]."""

    @property
    def a(self) -> Sequence[torch.Tensor]: ...
    @property
    def b(self) -> Sequence[torch.Tensor]: ...
    @property
    def scales(self) -> Sequence[torch.Tensor]: ...


class Arena(Protocol):
    """What is read of a site's arena: all of its rows, and those of each slot."""

    def all_rows(self) -> ArenaRows: ...
    def rows_of(self, slot: int) -> Rows | None: ...


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """The rank rows of a step's tokens at some sites.

    spans: [tokens, 3] int32: first row, rank (0: none here), place of the token's first value in `inner`.
    singles: [n] int32, tokens that are computed one by one. tiles: [m, 2] int32, first token and count of
    tokens that have the same rows. inner: [sum of ranks or more] float32, scratch.
    """

    spans: torch.Tensor
    singles: torch.Tensor
    tiles: torch.Tensor
    inner: torch.Tensor
    max_rank: int


class SpanProduct(Protocol):
    """Adds each token's low-rank product, over one layer of a site's arena."""

    def __call__(
        self,
        tokens: TokenSpans,
        a: torch.Tensor,
        b: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """y[t] += (scales * (x[t] A_t)) B_t over the token's own rows.

        a: [in, rows]. b: [rows, out]. scales: [rows] float32. x: [tokens, in]. y: [tokens, out], in place.
        """
        ...


def span_product(dtype: torch.dtype, device: torch.device) -> SpanProduct | None:
    """The kernels where they run; None where the products of `lowrank` do the work."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if find_spec("triton") is None:
        log.warning("triton is not installed: adapters are computed by dense products, which is slower")
        return None
    from adaptermesh.worker.engine.ops.lowrank_triton import triton_product

    problem = trial(triton_product, dtype, device)
    if problem:
        log.warning("adapters are computed by dense products, which is slower", extra={"reason": problem})
        return None
    return triton_product


def trial(product: SpanProduct, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with a product, by one small step; empty if nothing is. It also compiles the kernels."""
    a, b, x, y = (
        torch.linspace(-1.0, 1.0, rows * columns, device=device).view(rows, columns).to(dtype)
        for rows, columns in ((8, 64), (8, 48), (20, 64), (20, 48))
    )
    rows = {0: (1, 4), 1: (4, 8)}
    tokens = StepTokens((Segment(-1, 0, 1), Segment(0, 1, 3), Segment(1, 3, 20)))
    spans = _upload_spans(tokens, [0, 1], [tuple(rows.values())], device)[tuple(rows.values())]
    expected, scales = y.clone(), torch.full((8,), 0.5, device=device)
    with torch.inference_mode():
        plain_product(spans, a.t(), b, scales, x, expected)
        try:
            product(spans, a.t(), b, scales, x, y)
            right = torch.allclose(y.float(), expected.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
        except Exception as error:  # noqa: BLE001 (a kernel's refusal has any type; it is reported)
            return f"{type(error).__name__}: {error}"
    return "" if right else "its result is wrong"


def plain_product(
    tokens: TokenSpans,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """The twin of the kernels, token by token."""
    for token in _tokens(tokens):
        start, rank, _ = tokens.spans[token].tolist()
        own = slice(start, start + rank)
        inner = (x[token] @ a[:, own]).float() * scales[own]
        y[token] += inner.to(b.dtype) @ b[own]


def _tokens(tokens: TokenSpans) -> Iterator[int]:
    yield from tokens.singles.tolist()
    for first, count in tokens.tiles.tolist():
        yield from range(first, first + count)


@dataclass(frozen=True, slots=True)
class SpanSitePlan:
    """One site's share of a step."""

    tokens: TokenSpans
    rows: ArenaRows
    product: SpanProduct

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        rows = self.rows
        self.product(self.tokens, rows.a[layer], rows.b[layer], rows.scales[layer], x, y)


def plan_spans(
    arenas: Mapping[str, Arena], tokens: StepTokens, product: SpanProduct, device: torch.device
) -> Mapping[str, SitePlan]:
    """The plans of the sites that some active adapter touches. Sites with equal rows share their spans."""
    slots = sorted(tokens.active_slots)
    sites: dict[str, tuple[Rows | None, ...]] = {}
    for name, arena in arenas.items():
        rows = tuple(arena.rows_of(slot) for slot in slots)
        if any(rows):
            sites[name] = rows
    found = _upload_spans(tokens, slots, list(dict.fromkeys(sites.values())), device)
    return {name: SpanSitePlan(found[rows], arenas[name].all_rows(), product) for name, rows in sites.items()}


class CapturedSpans:
    """The spans of steps of one token a row, in buffers that stay where they are; every site has its own.

    `changes` counts what slots have gained and lost: as long as it and the rows' slots are as they were, the
    buffers are right already. The host's side is written again only after the step before has given its
    tokens, so its copy is done.
    """

    def __init__(
        self,
        arenas: Mapping[str, Arena],
        rows: int,
        rank: int,
        product: SpanProduct,
        device: torch.device,
        changes: Callable[[], int],
    ) -> None:
        self._arenas = arenas
        self._rank = rank
        self._product = product
        self._changes = changes
        self._filled: tuple[object, ...] = ()
        shape = (len(arenas), rows, SPAN_FIELDS)
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._singles = torch.arange(rows, dtype=torch.int32, device=device)
        self._no_tiles = torch.empty((0, 2), dtype=torch.int32, device=device)
        self._inner = torch.empty(rows * rank, device=device)

    def plan(self, rows: int) -> Mapping[str, SitePlan]:
        """The sites' plans, over the arenas as they are now."""
        return {
            name: SpanSitePlan(
                TokenSpans(spans[:rows], self._singles[:rows], self._no_tiles, self._inner, self._rank),
                arena.all_rows(),
                self._product,
            )
            for (name, arena), spans in zip(self._arenas.items(), self._device.unbind(0), strict=True)
        }

    def fill(self, slots: Sequence[int], rows: int) -> None:
        """Writes a step.

        Raises:
            ValueError: A rank is larger than there is room for. The step must not be replayed.
        """
        wanted = (*slots, rows, self._changes())
        if wanted == self._filled:
            return
        self._filled = ()
        host = self._host.numpy()
        for site, arena in zip(host, self._arenas.values(), strict=True):
            found = [arena.rows_of(slot) or (0, 0) for slot in slots]
            if max(end - start for start, end in found) > self._rank:
                raise ValueError(f"a rank is above the {self._rank} of this capture")
            # Each row has room for the largest rank in the scratch, whatever its own is.
            site[: len(found)] = [
                (start, end - start, row * self._rank) for row, (start, end) in enumerate(found)
            ]
            site[len(found) : rows] = 0
        self._device.copy_(self._host, non_blocking=True)
        self._filled = wanted


def _upload_spans(
    tokens: StepTokens,
    slots: Sequence[int],
    groups: Sequence[tuple[Rows | None, ...]],
    device: torch.device,
) -> Mapping[tuple[Rows | None, ...], TokenSpans]:
    """The spans by the rows that the slots have: one tensor, one copy."""
    singles, tiles = split_tokens(tokens.segments)
    count = tokens.segments[-1].end
    parts = [torch.tensor(singles, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32).flatten()]
    ranks = []
    for rows in groups:
        spans, sizes = segment_spans(tokens.segments, dict(zip(slots, rows, strict=True)))
        parts.append(spans.flatten())
        ranks.append(sizes)
    packed = to_device(torch.cat(parts), device)
    views = packed.split([len(singles), 2 * len(tiles), *[count * SPAN_FIELDS] * len(groups)])
    # Sites are computed one after the other, so one scratch does for all.
    inner = torch.empty(max((total for _, total in ranks), default=0), device=device)
    return {
        rows: TokenSpans(view.view(-1, SPAN_FIELDS), views[0], views[1].view(-1, 2), inner, largest)
        for rows, view, (largest, _) in zip(groups, views[2:], ranks, strict=True)
    }


def split_tokens(segments: Sequence[Segment]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of adapters: those computed one by one, and tiles (first token, count) of the long segments."""
    singles: list[int] = []
    tiles: list[tuple[int, int]] = []
    for segment in segments:
        if segment.slot < 0:
            continue
        if segment.end - segment.start < TILE_TOKENS:
            singles.extend(range(segment.start, segment.end))
            continue
        firsts = range(segment.start, segment.end, TILE_TOKENS)
        tiles.extend((first, min(TILE_TOKENS, segment.end - first)) for first in firsts)
    return singles, tiles


def segment_spans(
    segments: Sequence[Segment], rows_of: Mapping[int, Rows | None]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """[tokens, 3] int32 in host memory; then the largest rank and the sum of all tokens' ranks."""
    found = [rows_of.get(segment.slot) or (0, 0) for segment in segments]
    counts = torch.tensor([segment.end - segment.start for segment in segments])
    by_segment = torch.tensor([(start, end - start) for start, end in found], dtype=torch.int32)
    by_token = by_segment.repeat_interleave(counts, 0)
    ranks = by_token[:, 1]
    ends = ranks.cumsum(0, dtype=torch.int32)
    total = int(ends[-1])
    spans = torch.cat((by_token, (ends - ranks)[:, None]), 1)
    return spans, (max(end - start for start, end in found), total)
