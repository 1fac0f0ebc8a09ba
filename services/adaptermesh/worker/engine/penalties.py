"""Penalties: earlier tokens of a sequence change what is drawn next."""

from collections.abc import Sequence

import torch

from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.engine.upload import to_device


class TokenHistory:
    """How often each token is in a sequence's output, counted as the sequence grows.

    A function of the sequence's tokens alone: a preemption changes nothing. At most one entry for each token
    of the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.counts = dict.fromkeys(prompt_ids, 0)
        """By token; 0 for one that is in the prompt only."""
        self._counted = len(prompt_ids)

    def catch_up(self, tokens: Sequence[int]) -> "TokenHistory":
        """Counts what was generated since the last call. tokens: the prompt, then all of the output."""
        for position in range(self._counted, len(tokens)):
            token = tokens[position]
            self.counts[token] = self.counts.get(token, 0) + 1
        self._counted = len(tokens)
        return self


def make_history(params: SamplingParams, prompt_ids: Sequence[int]) -> TokenHistory | None:
    """A history for a request with penalties; None for all others, which pay nothing for it."""
    return TokenHistory(params, prompt_ids) if params.penalised else None


def penalise(logits: torch.Tensor, histories: Sequence[TokenHistory | None]) -> torch.Tensor:
    """The logits after each row's penalties; the same tensor if none has any. logits: [rows, vocabulary].

    First the repetition penalty, over prompt and output, then frequency and presence, over the output.
    Sources: CTRL (arXiv:1909.05858), section 4.1, for negative logits as transformers does it; OpenAI's API
    reference for frequency and presence.
    """
    vocabulary = logits.shape[1]
    places: list[int] = []
    factors: list[float] = []
    subtrahends: list[float] = []
    for row, history in enumerate(histories):
        if history is None:
            continue
        params, counts = history.params, history.counts
        places.extend(row * vocabulary + token for token in counts)
        factors.extend([params.repetition_penalty] * len(counts))
        subtrahends.extend(
            count * params.frequency_penalty + (params.presence_penalty if count else 0.0)
            for count in counts.values()
        )
    if not places:
        return logits
    device = logits.device
    at = to_device(places, device)
    factor = to_device(factors, device, logits.dtype)
    changed = logits.flatten().clone()
    values = changed[at]
    values = torch.where(values > 0, values / factor, values * factor)
    changed[at] = values - to_device(subtrahends, device, logits.dtype)
    return changed.view_as(logits)
