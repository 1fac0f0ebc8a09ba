"""What is asked for and what comes back: prompts, events of the stream, the collected answer."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.client.wire import tier_name
from adaptermesh.core.choices import check_choices
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.priority import check_priority
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.rpc.sampling import read_logprobs, sampling_message


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Exactly one of a conversation, raw text (no chat template) and token ids."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    token_ids: tuple[int, ...] | None = None

    @classmethod
    def chat(cls, content: str, *, system: str = "") -> "Prompt":
        """One user message, after a system message if there is one."""
        before = (Message("system", system),) if system else ()
        return cls(messages=(*before, Message("user", content)))

    @classmethod
    def raw(cls, text: str) -> "Prompt":
        """Text that is tokenised as it is."""
        return cls(text=text)


@dataclass(frozen=True, slots=True)
class Ask:
    """Whose request it is, and what it relies on. Every field may be left out.

    `tenant` counts only where no authentication is configured. `cohort_key` makes A/B shares sticky.
    `min_feed_position` (every mutation returns one) lets the request see that change. `base_model` refuses
    an answer from another base. Among waiting requests a higher `priority`, [-100, 100], goes first.
    """

    tenant: str = ""
    cohort_key: str = ""
    base_model: str = ""
    request_id: str = ""
    min_feed_position: int = 0
    priority: int = 0


class SwitchKind(enum.StrEnum):
    """What serving the adapter took on the worker."""

    NONE = "none"
    """The bare base model: nothing to switch."""
    WARM = "warm"
    """It was in a device slot."""
    COOL = "cool"
    """It came from host memory or the disk cache."""
    COLD = "cold"
    """It was streamed from the store."""


_SWITCH_KINDS: dict[int, SwitchKind] = {
    adapter_pb2.SWITCH_KIND_WARM: SwitchKind.WARM,
    adapter_pb2.SWITCH_KIND_COOL: SwitchKind.COOL,
    adapter_pb2.SWITCH_KIND_COLD: SwitchKind.COLD,
}


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: what serves the request. `tier` is where the worker had the adapter at admission."""

    request_id: str
    trace_id: str
    adapter_version: str
    adapter_digest: str
    base_digest: str
    ref: str
    cohort: str
    route_generation: int
    worker_id: str
    tier: str
    switch_kind: SwitchKind
    prompt_tokens: int
    warnings: tuple[str, ...] = ()
    """What to know of what serves it: that a version is deprecated, why, and what to use instead."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What the model thought of the prompt's next tokens, from its second one on; only if asked for."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """More text, and the tokens that it came from; `logprobs` has one for each if they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    """Which answer it belongs to."""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """One of several answers has ended; only if more than one was asked for."""

    index: int
    finish_reason: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer. `finish_reason` is "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent on each step of the switch path, as the worker measured them; 0 if it did not happen.

    `overlap` is the part of the prompt's computing that went on while the adapter was still arriving.
    """

    time_to_first_token: float = 0.0
    queue: float = 0.0
    fetch: float = 0.0
    verify: float = 0.0
    h2d: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    shared_fetch: bool = False
    fetched_bytes: int = 0
    overlap: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. `finish_reason` is "stop" or "length"; `output_tokens` are those of all answers.

    `cached_tokens` of the prompt came from the worker's prefix cache and were not computed.
    """

    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    timings: Timings
    cached_tokens: int = 0


Event = Started | PromptLogprobs | Delta | ChoiceFinished | Finished


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; `text`, `token_ids` and `logprobs` are the first one's if several were asked for.

    `prompt_logprobs` has one for each token of the prompt but the first if they were asked for.
    `ttft` and `duration` are seconds as this client saw them: from the call to the first token, to the end.
    """

    choices: tuple[Choice, ...]
    started: Started
    finished: Finished
    ttft: float
    duration: float
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One for each token if they were asked for."""
        return self.choices[0].logprobs

    @property
    def version(self) -> str:
        """Either `namespace/name:v3` or `base`."""
        return self.started.adapter_version

    @property
    def digest(self) -> str:
        """The adapter version's identity; empty for the base model."""
        return self.started.adapter_digest

    @property
    def request_id(self) -> str:
        return self.started.request_id

    @property
    def trace_id(self) -> str:
        """For `adaptermesh trace show`; empty if the mesh records no traces."""
        return self.started.trace_id


def request_of(
    prompt: Prompt | str, sampling: SamplingParams, ask: Ask, n: int
) -> inference_pb2.GenerateRequest:
    """The wire's request; a plain string is one user message.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_FIELD) with the field's name.
    """
    chosen = Prompt.chat(prompt) if isinstance(prompt, str) else prompt
    request = inference_pb2.GenerateRequest(
        sampling=sampling_message(sampling.check()),
        base_model=ask.base_model,
        priority=check_priority(ask.priority),
        n=check_choices(n),
    )
    if chosen.token_ids is not None:
        request.token_ids.ids.extend(chosen.token_ids)
    elif chosen.text is not None:
        request.text = chosen.text
    else:
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=message.role, content=message.content)
            for message in chosen.messages
        )
    return request


def started_of(message: inference_pb2.GenerateStarted, trace_id: str) -> Started:
    return Started(
        request_id=message.request_id,
        trace_id=trace_id,
        adapter_version=message.adapter_version,
        adapter_digest=message.adapter_digest,
        base_digest=message.base_digest,
        ref=message.ref,
        cohort=message.cohort,
        route_generation=message.route_generation,
        worker_id=message.worker_id,
        tier=tier_name(message.tier),
        switch_kind=_SWITCH_KINDS.get(message.switch_kind, SwitchKind.NONE),
        prompt_tokens=message.prompt_tokens,
        warnings=tuple(message.warnings),
    )


def prompt_logprobs_of(message: inference_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(read_logprobs(message.logprobs))


def delta_of(message: inference_pb2.GenerateDelta) -> Delta:
    return Delta(message.text, tuple(message.token_ids), read_logprobs(message.logprobs), message.index)


def choice_finished_of(message: inference_pb2.ChoiceFinished) -> ChoiceFinished:
    return ChoiceFinished(message.index, _finish_reason(message.finish_reason), message.output_tokens)


def choices_of(events: Sequence[Delta | ChoiceFinished], finished: Finished) -> tuple[Choice, ...]:
    """The answers, put together from all events of a stream that has ended."""
    reasons = {0: finished.finish_reason}
    deltas: dict[int, list[Delta]] = {0: []}
    for event in events:
        if isinstance(event, ChoiceFinished):
            reasons[event.index] = event.finish_reason
        else:
            deltas.setdefault(event.index, []).append(event)
    return tuple(
        Choice(
            text="".join(delta.text for delta in parts),
            token_ids=tuple(token for delta in parts for token in delta.token_ids),
            finish_reason=reasons.get(index, finished.finish_reason),
            logprobs=tuple(one for delta in parts for one in delta.logprobs),
        )
        for index, parts in sorted(deltas.items())
    )


def finished_of(message: inference_pb2.GenerateFinished) -> Finished:
    timings = message.timings
    return Finished(
        finish_reason=_finish_reason(message.finish_reason),
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
        timings=Timings(
            time_to_first_token=_seconds(timings.time_to_first_token),
            queue=_seconds(timings.queue),
            fetch=_seconds(timings.fetch),
            verify=_seconds(timings.verify),
            h2d=_seconds(timings.h2d),
            prefill=_seconds(timings.prefill),
            decode=_seconds(timings.decode),
            shared_fetch=timings.shared_fetch,
            fetched_bytes=timings.fetched_bytes,
            overlap=_seconds(timings.overlap),
        ),
        cached_tokens=message.cached_tokens,
    )


def _finish_reason(reason: int) -> str:
    return "stop" if reason == inference_pb2.FINISH_REASON_STOP else "length"


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
