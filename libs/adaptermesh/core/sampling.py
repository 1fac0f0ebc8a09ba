"""Sampling parameters and their ranges, checked at the gateway and again at the worker."""

import math
from dataclasses import dataclass

from adaptermesh.core.errors import invalid_field

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    `temperature` 0 is greedy. `top_p` 1 and `top_k` 0 keep the whole distribution. `seed` None draws a fresh
    one. `stop` strings end the text before the first of them. `ignore_eos` generates on to `max_tokens`.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def check(self) -> "SamplingParams":
        """Returns itself if every value is in its range.

        Raises:
            MeshError: INVALID_ARGUMENT (INVALID_FIELD) with the field's name.
        """
        if not 1 <= self.max_tokens <= 131072:
            raise invalid_field("sampling.max_tokens", f"{self.max_tokens} is not in [1, 131072]")
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 2.0):
            raise invalid_field("sampling.temperature", f"{self.temperature} is not in [0, 2]")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise invalid_field("sampling.top_p", f"{self.top_p} is not in (0, 1]")
        if not 0 <= self.top_k <= 1_000_000:
            raise invalid_field("sampling.top_k", f"{self.top_k} is not in [0, 1000000]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise invalid_field("sampling.seed", f"{self.seed} is not in [0, 2^63)")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise invalid_field("sampling.stop", f"{len(self.stop)} strings are more than {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise invalid_field("sampling.stop", f"a stop string needs 1 to {MAX_STOP_LENGTH} characters")
        return self
