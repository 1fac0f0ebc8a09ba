"""Sampling parameters and their ranges, checked at the gateway and again at the worker."""

import math
from dataclasses import dataclass

from adaptermesh.core.errors import invalid_field

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 keep the whole distribution. `seed` None draws a fresh
    one. `stop` strings end the text before the first of them. `ignore_eos` generates on to `max_tokens`.

    `min_p` keeps tokens of at least this share of the likeliest one's probability; 0 keeps all.
    `repetition_penalty` divides what speaks for a token of the prompt or the output, 1 is off.
    `presence_penalty` is subtracted once from tokens of the output, `frequency_penalty` once for each time;
    0 is off. `stop_token_ids` end the text before them, as the end-of-sequence token does, even with
    `ignore_eos`. `logprobs` asks for each token's log probability and for this many of the likeliest tokens,
    under the model's distribution, before penalties and temperature; None asks for none. `prompt_logprobs`
    asks the same for each token of the prompt but the first, which nothing predicts.

    The order is penalties, temperature, min-p, top-k, top-p. Greedy needs the penalties alone.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change what is drawn."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def check(self) -> "SamplingParams":
        """Returns itself if every value is in its range.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD) with the field's name.
        """
        if not 1 <= self.max_tokens <= 131072:
            raise invalid_field("sampling.max_tokens", f"{self.max_tokens} is not in [1, 131072]")
        _check_range("temperature", self.temperature, 0, 2)
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise invalid_field("sampling.top_p", f"{self.top_p} is not in (0, 1]")
        if not 0 <= self.top_k <= 1_000_000:
            raise invalid_field("sampling.top_k", f"{self.top_k} is not in [0, 1000000]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise invalid_field("sampling.seed", f"{self.seed} is not in [0, 2^63)")
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_logprobs("logprobs", self.logprobs)
        _check_logprobs("prompt_logprobs", self.prompt_logprobs)
        self._check_stops()
        return self

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise invalid_field("sampling.stop", f"{len(self.stop)} strings are more than {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise invalid_field("sampling.stop", f"a stop string needs 1 to {MAX_STOP_LENGTH} characters")
        count = len(self.stop_token_ids)
        if count > MAX_STOP_TOKEN_IDS:
            raise invalid_field("sampling.stop_token_ids", f"{count} ids are more than {MAX_STOP_TOKEN_IDS}")
        for token in self.stop_token_ids:
            if not 0 <= token < 2**31:
                raise invalid_field("sampling.stop_token_ids", f"{token} is not in [0, 2^31)")


def _check_logprobs(field: str, count: int | None) -> None:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise invalid_field(f"sampling.{field}", f"{count} is not in [0, {MAX_LOGPROBS}]")


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise invalid_field(f"sampling.{field}", f"{value} is not in [{low:g}, {high:g}]")
