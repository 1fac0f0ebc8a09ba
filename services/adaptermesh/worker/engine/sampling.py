"""Drawing tokens for all rows of a step at once.

Each draw needs one uniform number, a function of the row's seed and of the token's position alone. So a row
draws the same tokens whatever else is in the batch, and again after it was preempted and computed anew.

The order is the usual one: penalties, temperature, min-p, top-k, top-p. Rows without penalties or randomness
pay for neither: a greedy batch is one argmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.penalties import TokenHistory, penalise
from adaptermesh.worker.engine.upload import to_device

_MASK = 2**64 - 1
_CANDIDATES = 1024
"""Tokens sorted for top-p before all of them are: enough for nearly every distribution."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row needs: its parameters, its seed, the position of the token to draw, what came before.

    `history` is None for a row without penalties.
    """

    params: SamplingParams
    seed: int
    position: int
    history: TokenHistory | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. Source: SplitMix64 (Steele, Lea, Flood 2014), two rounds."""
    value = _mix((seed + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK)
    value = _mix((value + 0x9E3779B97F4A7C15 * (seed + 1)) & _MASK)
    return (value >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draws one token a row. logits: [rows, vocabulary] float32; they stay as they are."""
    logits = penalise(logits, [draw.history for draw in draws])
    tokens = logits.argmax(-1)
    random = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    if random:
        rows = to_device(random, logits.device)
        drawn = _sample_random(logits.index_select(0, rows), [draws[row] for row in random])
        tokens.index_copy_(0, rows, drawn)
    # The one place where a step waits for its device, but for what `_sample_cut` says.
    found: list[int] = tokens.tolist()
    return found


def _sample_random(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """[rows] int64."""
    device = logits.device
    # float64: a cumulated sum over a vocabulary in float32 moves its borders by more than rows may notice.
    scaled = logits.double()
    scaled = scaled - scaled.amax(-1, keepdim=True)
    scaled /= to_device([draw.params.temperature for draw in draws], device, torch.float64)[:, None]
    weights = scaled.exp_()
    _cut_min_p(weights, draws)
    points = to_device([uniform(draw.seed, draw.position) for draw in draws], device, torch.float64)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=device)
    whole = [row for row, draw in enumerate(draws) if not _is_cut(draw.params)]
    cut = [row for row, draw in enumerate(draws) if _is_cut(draw.params)]
    if whole:
        rows = to_device(whole, device)
        tokens.index_copy_(0, rows, _pick(weights.index_select(0, rows), points.index_select(0, rows)))
    if cut:
        rows, params = to_device(cut, device), [draws[row].params for row in cut]
        drawn = _sample_cut(weights.index_select(0, rows), points.index_select(0, rows), params)
        tokens.index_copy_(0, rows, drawn)
    return tokens


def _cut_min_p(weights: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Sets weights below the row's share of its largest, which is 1, to 0. weights: [rows, vocabulary].

    Source: min-p sampling (arXiv:2407.01082).
    """
    rows = [row for row, draw in enumerate(draws) if draw.params.min_p > 0.0]
    if rows:
        # A share of 0 cuts nothing.
        shares = [draw.params.min_p for draw in draws]
        weights.masked_fill_(weights < to_device(shares, weights.device, weights.dtype)[:, None], 0.0)


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _sample_cut(
    weights: torch.Tensor, points: torch.Tensor, params: Sequence[SamplingParams]
) -> torch.Tensor:
    """Top-k, then top-p of what is left. weights: [rows, vocabulary], not normalised."""
    size = weights.shape[1]
    top_k = to_device([p.top_k if 0 < p.top_k < size else size for p in params], weights.device)
    top_p = to_device([p.top_p for p in params], weights.device, weights.dtype)
    total = weights.sum(-1)
    count = min(size, _CANDIDATES)
    kept, ids = weights.topk(count, -1)
    # A row needs all tokens sorted if neither its k nor its mass lies within the candidates. On CUDA the step
    # waits for that once more; to sort a whole vocabulary always would cost more.
    enough = (top_k <= count) | (kept.sum(-1) >= top_p * total)
    if count < size and not bool(enough.all()):
        count = size
        kept, ids = weights.sort(-1, descending=True)
    kept = kept.masked_fill(torch.arange(count, device=weights.device) >= top_k[:, None], 0.0)
    mass = torch.where(top_k < size, kept.sum(-1), total)
    before = kept.cumsum(-1) - kept
    # The first token stays whatever its weight; then as long as the mass before it is short of top_p.
    kept = kept.masked_fill(before >= (top_p * mass)[:, None], 0.0)
    return ids.gather(-1, _pick(kept, points)[:, None])[:, 0]


def _pick(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The token in whose share of the mass the point lies. weights: [rows, n]; points: [rows] in [0, 1)."""
    cumulated = weights.cumsum(-1)
    targets = (points * cumulated[:, -1])[:, None]
    # right=True: a token of no weight has no share, not even its border.
    found = torch.searchsorted(cumulated, targets, right=True)[:, 0]
    last = (weights > 0).to(torch.int8).cumsum(-1, dtype=torch.int64).argmax(-1)
    return torch.minimum(found, last)
