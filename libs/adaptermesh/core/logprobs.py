"""What the model thought of a token that was drawn, or that the prompt has."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities (natural) under the model's own distribution: no penalty, no temperature, no cut.

    Attributes:
        token_id: The token that was drawn, or that comes next in the prompt.
        logprob: Its log probability.
        top: Ids and log probabilities of the likeliest tokens, best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
