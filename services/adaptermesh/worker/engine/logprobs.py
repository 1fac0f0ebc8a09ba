"""Log probabilities of tokens, drawn or of the prompt, and of the likeliest ones in their place."""

from collections.abc import Sequence

import torch

from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams

_ROWS = 64
"""Rows whose probabilities exist at once; of a row's logits no more than what was asked for is kept."""


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], params: Sequence[SamplingParams]
) -> list[TokenLogprobs | None]:
    """What the rows ask for; None for those that ask for nothing, which pay nothing.

    Args:
        logits: [rows, vocabulary], as the model gave them: no penalty, no temperature.
        tokens: The token that was drawn for each row.
        params: Of each row.
    """
    found: list[TokenLogprobs | None] = [None] * len(tokens)
    rows = [row for row, one in enumerate(params) if one.logprobs is not None]
    if not rows:
        return found
    part = logits if len(rows) == len(tokens) else logits[rows]
    scored = score(part, [tokens[row] for row in rows], [params[row].logprobs or 0 for row in rows])
    for row, logprobs in zip(rows, scored, strict=True):
        found[row] = logprobs
    return found


def score(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """One token a row, and as many of the likeliest ones as the row's count says.

    logits: [rows, vocabulary].
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(tokens), _ROWS):
        end = start + _ROWS
        found.extend(_score(logits[start:end], tokens[start:end], counts[start:end]))
    return found


def _score(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(max(counts), logits.shape[1]), -1)
    values, ids = top.values.tolist(), top.indices.tolist()
    return [
        TokenLogprobs(
            token, chosen[row], tuple(zip(ids[row][: counts[row]], values[row][: counts[row]], strict=True))
        )
        for row, token in enumerate(tokens)
    ]
