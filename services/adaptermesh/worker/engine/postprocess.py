"""What becomes of what a step has computed."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.worker.engine.request import FinishReason
from adaptermesh.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn, and its log probabilities if the request asks for them."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Scored:
    """Log probabilities of a prompt's next tokens."""

    sequence: Sequence
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens drawn for the rows that sample, in their order, and the prompts that were scored."""

    drawn: tuple[Drawn, ...]
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """A generation that has come to its end."""

    reason: FinishReason


def take_token(sequence: Sequence, drawn: Drawn, eos_ids: AbstractSet[int]) -> Ending | None:
    """Appends a token, tells the listener, and says whether it was the last one."""
    token, sampling = drawn.token, sequence.request.sampling
    sequence.tokens.append(token)
    ended = (token in eos_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids
    # The end token is no text, even where the tokenizer doesn't know it as special.
    text, stopped = ("", False) if ended else sequence.text.push(token)
    full = len(sequence.tokens) >= sequence.limit
    if (ended or full) and not stopped:
        text += sequence.text.flush()
    sequence.listener.on_tokens(text, [token], () if drawn.logprobs is None else (drawn.logprobs,))
    if ended or stopped:
        return Ending(FinishReason.STOP)
    return Ending(FinishReason.LENGTH) if full else None
