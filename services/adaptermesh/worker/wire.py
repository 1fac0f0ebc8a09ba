"""The worker's nouns as protobuf messages, and back."""

from collections.abc import Iterator

from google.protobuf import duration_pb2

from adaptermesh.api.adapter.v1 import adapter_pb2
from adaptermesh.api.inference.v1 import inference_pb2
from adaptermesh.api.router.v1 import router_pb2
from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.artifact.base_facts import BaseFacts
from adaptermesh.core.digests import canonical_json
from adaptermesh.core.errors import invalid_field
from adaptermesh.core.tiers import Tier
from adaptermesh.rpc.sampling import logprobs_messages, read_sampling
from adaptermesh.worker.engine.request import FinishReason, Outcome, Timeline
from adaptermesh.worker.engine.status import EngineStatus, ResidencyView
from adaptermesh.worker.generation import GenerationRequest
from adaptermesh.worker.mailbox import Mail
from adaptermesh.worker.prompts import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from adaptermesh.worker.residency import Delta, Snapshot

MAX_DELTA_LOGPROBS = 1024
"""Tokens of one message that has log probabilities, of the output or the prompt: some 300 KB at most."""

_TIERS = {
    Tier.NONE: adapter_pb2.TIER_UNSPECIFIED,
    Tier.STORE: adapter_pb2.TIER_STORE,
    Tier.DISK: adapter_pb2.TIER_DISK,
    Tier.HOST: adapter_pb2.TIER_HOST,
    Tier.DEVICE: adapter_pb2.TIER_DEVICE,
}
_SWITCH_KINDS = {
    Tier.NONE: adapter_pb2.SWITCH_KIND_UNSPECIFIED,
    Tier.STORE: adapter_pb2.SWITCH_KIND_COLD,
    Tier.DISK: adapter_pb2.SWITCH_KIND_COOL,
    Tier.HOST: adapter_pb2.SWITCH_KIND_COOL,
    Tier.DEVICE: adapter_pb2.SWITCH_KIND_WARM,
}
_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def base_model_message(base: BaseFacts) -> adapter_pb2.BaseModel:
    return adapter_pb2.BaseModel(
        model_id=base.model_id,
        digest=base.digest,
        config_digest=base.config_digest,
        weights_digest=base.weights_digest,
        architecture=base.architecture,
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        vocab_size=base.vocab_size,
        config_json=canonical_json(dict(base.config)).decode(),
    )


def generation_request(message: worker_pb2.GenerateRequest) -> GenerationRequest:
    """The request's fields; raises MeshError INVALID_ARGUMENT if it has no input."""
    return GenerationRequest(
        request_id=message.request_id,
        tenant=message.tenant,
        adapter_digest=message.adapter_digest,
        adapter_version=message.adapter_version,
        base_digest=message.base_digest,
        prompt=_prompt(message),
        sampling=read_sampling(message.sampling),
        priority=message.priority,
        n=message.n or 1,
        composition=message.composition,
    )


def _prompt(message: worker_pb2.GenerateRequest) -> Prompt:
    match message.WhichOneof("input"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            return ChatPrompt(tuple(ChatMessage(m.role, m.content) for m in message.chat.messages))
        case "token_ids":
            return TokenPrompt(tuple(message.token_ids.ids))
    raise invalid_field("input", "needs one of text, chat and token_ids")


def wanted_tier(tier: adapter_pb2.Tier.ValueType) -> Tier:
    """The tier that a load asks for; raises MeshError INVALID_ARGUMENT."""
    wanted = next((key for key, value in _TIERS.items() if value == tier), None)
    if wanted is Tier.NONE:
        return Tier.DEVICE
    if wanted is None or wanted is Tier.STORE:
        raise invalid_field("tier", "is not one of TIER_DISK, TIER_HOST and TIER_DEVICE")
    return wanted


def started_message(worker_id: str, tier: Tier, prompt_tokens: int) -> worker_pb2.GenerateResponse:
    return worker_pb2.GenerateResponse(
        started=worker_pb2.GenerateStarted(
            worker_id=worker_id,
            tier=_TIERS[tier],
            switch_kind=_SWITCH_KINDS[tier],
            prompt_tokens=prompt_tokens,
        )
    )


def prompt_messages(mail: Mail) -> Iterator[worker_pb2.GenerateResponse]:
    """What the mail says of the prompt; no message if it says nothing."""
    for start in range(0, len(mail.prompt_logprobs), MAX_DELTA_LOGPROBS):
        part = mail.prompt_logprobs[start : start + MAX_DELTA_LOGPROBS]
        logprobs = inference_pb2.PromptLogprobs(logprobs=logprobs_messages(part))
        yield worker_pb2.GenerateResponse(prompt_logprobs=logprobs)


def delta_messages(mail: Mail) -> Iterator[worker_pb2.GenerateResponse]:
    """The mail's output: one message, unless log probabilities would make it too large.

    The text comes with the last one: it is certain only once all its tokens are there.
    """
    size = MAX_DELTA_LOGPROBS if mail.logprobs else max(1, len(mail.token_ids))
    for start in range(0, max(1, len(mail.token_ids)), size):
        last = start + size >= len(mail.token_ids)
        delta = inference_pb2.GenerateDelta(
            text=mail.text if last else "",
            token_ids=mail.token_ids[start : start + size],
            logprobs=logprobs_messages(mail.logprobs[start : start + size]),
            index=mail.index,
        )
        yield worker_pb2.GenerateResponse(delta=delta)


def choice_finished_message(index: int, outcome: Outcome) -> worker_pb2.GenerateResponse:
    return worker_pb2.GenerateResponse(
        choice_finished=inference_pb2.ChoiceFinished(
            index=index,
            finish_reason=_FINISH_REASONS[outcome.finish_reason],
            output_tokens=outcome.output_tokens,
        )
    )


def finished_message(outcome: Outcome) -> worker_pb2.GenerateResponse:
    return worker_pb2.GenerateResponse(
        finished=inference_pb2.GenerateFinished(
            finish_reason=_FINISH_REASONS[outcome.finish_reason],
            prompt_tokens=outcome.prompt_tokens,
            output_tokens=outcome.output_tokens,
            timings=_timings(outcome.timeline),
            cached_tokens=outcome.timeline.cached_tokens,
        )
    )


def _timings(timeline: Timeline) -> inference_pb2.Timings:
    timings = inference_pb2.Timings(shared_fetch=timeline.shared_fetch, fetched_bytes=timeline.fetched_bytes)
    steps = (
        (timings.time_to_first_token, timeline.submitted_ns, timeline.first_token_ns),
        (timings.queue, timeline.submitted_ns, timeline.scheduled_ns),
        (timings.fetch, timeline.fetch_start_ns, timeline.fetch_end_ns),
        (timings.h2d, timeline.h2d_start_ns, timeline.h2d_end_ns),
        (timings.prefill, timeline.scheduled_ns, timeline.first_token_ns),
        (timings.decode, timeline.first_token_ns, timeline.finished_ns),
    )
    for duration, start_ns, end_ns in steps:
        if start_ns and end_ns:
            _set(duration, max(0, end_ns - start_ns))
    if timeline.fetch_start_ns:
        _set(timings.verify, timeline.verify_ns)
    if timeline.overlapped_ns:
        _set(timings.overlap, timeline.overlapped_ns)
    return timings


def _set(duration: duration_pb2.Duration, nanoseconds: int) -> None:
    # An explicit presence: a step of zero length did happen.
    duration.SetInParent()
    duration.FromNanoseconds(nanoseconds)


def state_message(draining: bool) -> worker_pb2.WorkerState.ValueType:
    return worker_pb2.WORKER_STATE_DRAINING if draining else worker_pb2.WORKER_STATE_READY


def load_message(status: EngineStatus) -> worker_pb2.Load:
    return worker_pb2.Load(
        running_requests=status.running,
        waiting_requests=status.waiting,
        waiting_tokens=status.waiting_tokens,
        kv_used_tokens=status.kv_used_tokens,
        kv_total_tokens=status.kv_total_tokens,
        budgets=_budgets(status),
    )


def _budgets(status: EngineStatus) -> worker_pb2.Budgets:
    tiers = status.tiers
    return worker_pb2.Budgets(
        device_used_bytes=tiers.device_used_bytes,
        device_used_slots=tiers.device_used_slots,
        host_used_bytes=tiers.host_used_bytes,
        host_budget_bytes=tiers.host_budget_bytes,
        disk_used_bytes=tiers.disk_used_bytes,
        disk_budget_bytes=tiers.disk_budget_bytes,
        kv_used_bytes=status.kv_used_bytes,
        kv_cached_bytes=status.kv_cached_bytes,
        kv_total_bytes=status.kv_total_bytes,
        device_budget_bytes=tiers.device_budget_bytes,
    )


def residency_message(view: ResidencyView) -> worker_pb2.Residency:
    return worker_pb2.Residency(
        digest=view.digest,
        tier=_TIERS[view.tier],
        pinned=view.pinned,
        requests=view.requests,
        size_bytes=view.size_bytes,
        device_bytes=view.device_bytes,
    )


def status_message(info: worker_pb2.WorkerInfo, snapshot: Snapshot) -> worker_pb2.GetStatusResponse:
    return worker_pb2.GetStatusResponse(
        info=info,
        state=state_message(snapshot.draining),
        load=load_message(snapshot.status),
        residencies=[residency_message(view) for view in snapshot.residencies],
    )


def report_message(
    info: worker_pb2.WorkerInfo, sequence: int, report: Snapshot | Delta
) -> router_pb2.ReportWorkerRequest:
    state = state_message(report.draining)
    load = load_message(report.status)
    residencies = [residency_message(view) for view in report.residencies]
    if isinstance(report, Snapshot):
        snapshot = router_pb2.WorkerSnapshot(
            info=info, state=state, load=load, residencies=residencies, request_ids=report.request_ids
        )
        return router_pb2.ReportWorkerRequest(sequence=sequence, snapshot=snapshot)
    delta = router_pb2.WorkerDelta(
        state=state, load=load, residencies=residencies, admitted_request_ids=report.admitted
    )
    return router_pb2.ReportWorkerRequest(sequence=sequence, delta=delta)
