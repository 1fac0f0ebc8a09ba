"""Log probabilities of drawn tokens and of the likeliest ones beside them."""

from collections.abc import Sequence

import torch

from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams


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
    part = (logits if len(rows) == len(tokens) else logits[rows]).float().log_softmax(-1)
    drawn = torch.tensor([tokens[row] for row in rows], device=logits.device)
    chosen = part.gather(-1, drawn[:, None])[:, 0].tolist()
    wanted = [min(params[row].logprobs or 0, logits.shape[1]) for row in rows]
    top = part.topk(max(wanted), -1)
    values, ids = top.values.tolist(), top.indices.tolist()
    for index, row in enumerate(rows):
        count = wanted[index]
        pairs = zip(ids[index][:count], values[index][:count], strict=True)
        found[row] = TokenLogprobs(tokens[row], chosen[index], tuple(pairs))
    return found
