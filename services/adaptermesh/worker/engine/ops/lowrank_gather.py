"""Low-rank products in which each token meets its own rank rows only, read where they lie in the arena.

Both products are sparse: the first gives the wanted entries of x A^T alone (a sampled dense-dense product),
the second is a weighted sum of rows of B for each token (an embedding bag). Work and memory traffic follow
the sum of the tokens' own ranks, whatever the order of the adapters in the arena; a token never meets a
foreign row, so nobody's infinity reaches anybody else. Source of the grouping: BGMV of Punica
(arXiv:2310.18547).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_SUM = 0
"""The mode of an embedding bag."""


def can_gather(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether both sparse products exist and are fast here."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return False
    with warnings.catch_warnings():
        # The first CSR tensor of a process warns that their interface may change.
        warnings.simplefilter("ignore")
        _pattern(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (0, 0))
    return True


def _pattern(
    starts: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    return torch.sparse_csr_tensor(starts, rows, values, size, check_invariants=False)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Which rank rows each of some tokens has. Built once a step, shared by layers and sites.

    starts: [tokens + 1] int64, where each token's part of `rows` begins. rows: [n] int64. pattern: [tokens,
    capacity] CSR, where x A^T is put; values: [n], its values. scales: [n], or None if `scale` is that of all
    or some adapter's scale differs between layers.
    """

    starts: torch.Tensor
    rows: torch.Tensor
    pattern: torch.Tensor
    values: torch.Tensor
    scale: float | None
    scales: torch.Tensor | None

    @classmethod
    def of(
        cls, spans: Sequence[tuple[int, int, float | None]], capacity: int, dtype: torch.dtype
    ) -> "TokenRows":
        """spans: for each token the first row, the end, and the scale (None: it differs between layers)."""
        starts: list[int] = [0]
        rows: list[int] = []
        for start, end, _ in spans:
            rows.extend(range(start, end))
            starts.append(len(rows))
        crow, columns = torch.tensor(starts), torch.tensor(rows)
        zeros = torch.zeros(len(rows), dtype=dtype)
        pattern = _pattern(crow, columns, zeros, (len(spans), capacity))
        values = pattern.values()
        known = [scale for _, _, scale in spans if scale is not None]
        if len(known) < len(spans):
            return cls(crow, columns, pattern, values, None, None)
        if len(set(known)) == 1:
            return cls(crow, columns, pattern, values, known[0], None)
        scales = torch.tensor(known, dtype=dtype).repeat_interleave(crow.diff())
        return cls(crow, columns, pattern, values, None, scales)


@dataclass(frozen=True, slots=True)
class GatheredProduct:
    """Tokens [start, end) with their own rows. By layer: a is [in, capacity], b is [capacity, out]."""

    start: int
    end: int
    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]
    scales: Sequence[torch.Tensor]
    own: TokenRows

    def apply(self, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        own = self.own
        alpha = 1.0 if own.scale is None else own.scale
        if self.end - self.start < x.shape[0]:
            x, y = x[self.start : self.end], y[self.start : self.end]
        # In place: a result of its own would copy the pattern. Zeroed, for beta = 0 does not forget a NaN.
        inner = own.values.zero_()
        torch.sparse.sampled_addmm(own.pattern, x, self.a[layer], beta=0.0, alpha=alpha, out=own.pattern)
        if own.scale is None:
            scales = own.scales
            inner *= self.scales[layer].index_select(0, own.rows) if scales is None else scales
        added = torch.embedding_bag(
            self.b[layer], own.rows, own.starts, False, _SUM, False, inner, include_last_offset=True
        )[0]
        y.add_(added)
