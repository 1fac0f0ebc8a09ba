"""What goes into the engine and what comes out of it."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adaptermesh.core.errors import MeshError
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `digest` None asks for the bare base. `context` is handed to the source, unread.

    `priority` is in [-100, 100], higher first. `deadline_ns` is by the wall clock; 0 means none.
    `reuse_prefix` False computes every token of the prompt, whatever the prefix cache holds.
    """

    request_id: str
    tenant: str
    digest: str | None
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    context: object | None = None
    reuse_prefix: bool = True
    priority: int = 0
    deadline_ns: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """A request was taken. `tier` is where its adapter was at that moment; NONE for the base."""

    tier: Tier
    prompt_tokens: int


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    """The end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the context is full."""


@dataclass(slots=True)
class Timeline:
    """When each step of the switch path happened, in wall-clock ns; 0 where it did not happen.

    `fetch_*` is the transfer from the store; `verify_ns` is the part of it that went into digests.
    `shared_fetch` says that another request had started it. `cached_tokens` of the prompt came from the
    prefix cache when the request first joined the batch. `h2d_*` is from the first layer's copy to the last
    one's. `overlapped_ns` is the time in which layers of the prompt were computed, for good, before the last
    byte of the adapter had come.
    """

    submitted_ns: int = 0
    fetch_start_ns: int = 0
    fetch_end_ns: int = 0
    h2d_start_ns: int = 0
    h2d_end_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    finished_ns: int = 0
    verify_ns: int = 0
    fetched_bytes: int = 0
    shared_fetch: bool = False
    tier_at_admission: Tier = Tier.NONE
    cached_tokens: int = 0
    overlapped_ns: int = 0

    def note_overlap(self, start_ns: int, end_ns: int) -> None:
        """Layers of the prompt were computed; what lies before the end of the fetch overlapped with it."""
        last_ns = min(end_ns, self.fetch_end_ns) if self.fetch_end_ns else end_ns
        self.overlapped_ns += max(0, last_ns - start_ns)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended. `output_tokens` counts an end-of-sequence token too."""

    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    timeline: Timeline


class Listener(Protocol):
    """Hears about one request, on the engine's thread: it must not block.

    Any number of `on_prompt`, then of `on_tokens`, then exactly one of `on_finish` and `on_error`, which is
    the last call.
    """

    def on_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """The prompt's next tokens, from its second one on; each once, if the request asks for them."""
        ...

    def on_tokens(self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """New tokens and the text that is now certain; the text may be empty or lag behind the tokens.

        `logprobs` has one for each token if the request asks for them, else none.
        """
        ...

    def on_finish(self, outcome: Outcome) -> None: ...

    def on_error(self, error: MeshError) -> None: ...
