"""One request from its checks to its end: the bridge between the engine's thread and the call's stream."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from opentelemetry.context import Context

from adaptermesh.core.choices import check_choices
from adaptermesh.core.clock import Clock
from adaptermesh.core.composition import Composition, composition_digest, parse_resolved
from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
from adaptermesh.core.priority import check_priority
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.worker.backend import Backend
from adaptermesh.worker.engine.request import Admission, Outcome, Request
from adaptermesh.worker.mailbox import Mail, Mailbox
from adaptermesh.worker.prompts import Prompt, PromptEncoder
from adaptermesh.worker.residency import StatusBoard
from adaptermesh.worker.spans import RequestSpans, ServedRequest

_DRAINING_RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the router resolved and the gateway sends."""

    request_id: str
    tenant: str
    adapter_digest: str
    """Empty for the bare base model."""
    adapter_version: str
    base_digest: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    n: int = 1
    """Answers to the same prompt."""
    composition: str = ""
    """Over digests, where adapter_digest is a composition's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One of a request's answers: a request of its own in the engine."""

    backend_id: str
    mailbox: Mailbox


class Generation:
    """An admitted request. Whoever has it must `close` it, whatever happened."""

    def __init__(
        self,
        request: GenerationRequest,
        answers: "tuple[Answer, ...]",
        served: ServedRequest,
        admission: Admission,
        arrived: asyncio.Event,
    ) -> None:
        self.request = request
        self.served = served
        self.admission = admission
        self.open = list(answers)
        """The answers that have not ended yet."""
        self.closed = False
        self._arrived = arrived
        self._outcomes: dict[int, Outcome] = {}

    def abort(self, error: MeshError) -> None:
        """Ends the stream with this error, after the output that is there already."""
        for answer in self.open:
            answer.mailbox.close(error)

    def outcome(self) -> Outcome:
        """Of an ended request: answer 0's, with the output of all answers."""
        output_tokens = sum(outcome.output_tokens for outcome in self._outcomes.values())
        return dataclasses.replace(self._outcomes[0], output_tokens=output_tokens)

    async def mails(self, deadline: float | None) -> AsyncIterator[Mail]:
        """The output as it comes; the last mail of each answer has its outcome.

        Args:
            deadline: the event loop's time at which waiting ends; None for no end.

        Raises:
            MeshError: what ended the request instead; DEADLINE_EXCEEDED at the deadline.
        """
        while self.open:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                raise MeshError(
                    Code.DEADLINE_EXCEEDED,
                    Reason.DEADLINE_EXCEEDED,
                    f"request '{self.request.request_id}' did not end before its deadline",
                ) from None
            self._arrived.clear()
            for answer in tuple(self.open):
                mail = answer.mailbox.take()
                if mail.end is not None:
                    self.open.remove(answer)
                if isinstance(mail.end, MeshError):
                    if mail.has_output:
                        yield dataclasses.replace(mail, end=None)
                    raise mail.end
                if mail.end is not None:
                    self._outcomes[mail.index] = mail.end
                if not mail.empty:
                    yield mail


class Generations:
    """Admits requests and looks after the admitted ones."""

    def __init__(
        self,
        backend: Backend,
        encoder: PromptEncoder,
        board: StatusBoard,
        spans: RequestSpans,
        base_digest: str,
        clock: Clock,
        compose: Callable[[str, Composition], None],
    ) -> None:
        """`compose` is told what a composition's digest stands for, before it is asked for."""
        self._backend = backend
        self._compose = compose
        self._encoder = encoder
        self._board = board
        self._spans = spans
        self._base_digest = base_digest
        self._clock = clock
        self._open: set[Generation] = set()
        self._numbers = itertools.count(1)

    async def admit(
        self, request: GenerationRequest, context: Context, remaining: float | None
    ) -> Generation:
        """Checks the request and hands it to the engine.

        Args:
            request: What to generate.
            context: The caller's trace.
            remaining: Seconds until the call's deadline; None for no deadline.

        Raises:
            MeshError: INVALID_ARGUMENT, FAILED_PRECONDITION (BASE_MISMATCH), UNAVAILABLE (DRAINING), or what
                the engine refuses it with.
        """
        self._refuse_if_draining()
        _check(request)
        if request.composition:
            self._compose(request.adapter_digest, _read_composition(request))
        # Counted from here: encoding the prompt takes its share of the time.
        deadline_ns = 0 if remaining is None else int((self._clock.wall() + remaining) * 1e9)
        if request.base_digest != self._base_digest:
            raise base_differs(request.base_digest, self._base_digest)
        prompt_ids = await self._encoder.encode(request.prompt)
        # The worker may have begun to drain while the prompt was encoded.
        self._refuse_if_draining()
        served = ServedRequest(
            tenant=request.tenant,
            adapter_digest=request.adapter_digest,
            adapter_version=request.adapter_version,
            context=context,
        )
        arrived = asyncio.Event()
        # One id may come twice: in parallel calls of one caller, or in a retry that overtakes a cancel.
        answers = tuple(
            Answer(f"{request.request_id}#{next(self._numbers)}", Mailbox(arrived, index))
            for index in range(request.n)
        )
        first = Request(
            request_id=answers[0].backend_id,
            tenant=request.tenant,
            digest=request.adapter_digest or None,
            prompt_ids=prompt_ids,
            sampling=request.sampling,
            context=context,
            priority=request.priority,
            deadline_ns=deadline_ns,
        )
        admission = self._submit(first, answers)
        self._spans.admitted(served, admission.tier)
        generation = Generation(request, answers, served, admission, arrived)
        self._open.add(generation)
        self._board.admitted(request.request_id)
        return generation

    def _submit(self, first: Request, answers: tuple[Answer, ...]) -> Admission:
        """All answers or none."""
        admission = self._backend.submit(first, answers[0].mailbox)
        for index, answer in enumerate(answers[1:], 1):
            sampling = _for_answer(first.sampling, index)
            request = dataclasses.replace(first, request_id=answer.backend_id, sampling=sampling)
            try:
                self._backend.submit(request, answer.mailbox)
            except MeshError:
                for submitted in answers[:index]:
                    self._backend.cancel(submitted.backend_id)
                raise
        return admission

    def close(self, generation: Generation) -> None:
        """Forgets a request; what has not ended yet is cancelled in the engine. Any number of times."""
        if generation.closed:
            return
        generation.closed = True
        self._open.discard(generation)
        for answer in generation.open:
            self._backend.cancel(answer.backend_id)
        self._board.finished(generation.request.request_id)

    def finished(self, generation: Generation, outcome: Outcome) -> None:
        """Records what serving the request took."""
        self._spans.finished(generation.served, outcome)

    def failed(self, generation: Generation, error: MeshError) -> None:
        self._spans.failed(generation.served, error)

    def abort_all(self) -> int:
        """Ends every open stream with UNAVAILABLE after the output it has; returns how many there were."""
        generations = tuple(self._open)
        for generation in generations:
            generation.abort(_draining("the worker stopped before the request had ended"))
            for answer in generation.open:
                self._backend.cancel(answer.backend_id)
        return len(generations)

    def _refuse_if_draining(self) -> None:
        if self._board.draining:
            raise _draining("the worker is draining")


def base_differs(asked: str, served: str) -> MeshError:
    """The request was resolved for another base model than this worker's; both digests are named."""
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.BASE_MISMATCH,
        f"the request was resolved for base {asked or '(none)'}, this worker serves {served}",
        metadata={"base_digest": asked, "worker_base_digest": served},
    )


def _draining(message: str) -> MeshError:
    return unavailable(Reason.DRAINING, message, _DRAINING_RETRY_SECONDS)


def _for_answer(sampling: SamplingParams, index: int) -> SamplingParams:
    """Answer `index` draws with its own seed or a fresh one; answer 0 tells of the prompt for all."""
    seed = None if sampling.seed is None else (sampling.seed + index) % 2**63
    return dataclasses.replace(sampling, seed=seed, prompt_logprobs=None)


def _read_composition(request: GenerationRequest) -> Composition:
    found = parse_resolved(request.composition)
    if composition_digest(found) != request.adapter_digest:
        raise invalid_field("composition", f"its digest is not {request.adapter_digest[:80]}")
    return found


def _check(request: GenerationRequest) -> None:
    if not request.request_id:
        raise invalid_field("request_id", "is empty")
    if not request.tenant:
        raise invalid_field("tenant", "is empty")
    if request.adapter_digest and not is_digest(request.adapter_digest):
        raise invalid_field("adapter_digest", f"{request.adapter_digest[:80]!r} is not a digest")
    request.sampling.check()
    check_priority(request.priority)
    check_choices(request.n)
