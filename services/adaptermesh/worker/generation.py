"""One request from its checks to its end: the bridge between the engine's thread and the call's stream."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from opentelemetry.context import Context

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason, invalid_field, unavailable
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


class Generation:
    """An admitted request. Whoever has it must `close` it, whatever happened."""

    def __init__(
        self,
        request: GenerationRequest,
        backend_id: str,
        served: ServedRequest,
        admission: Admission,
        mailbox: Mailbox,
    ) -> None:
        self.request = request
        self.backend_id = backend_id
        self.served = served
        self.admission = admission
        self._mailbox = mailbox
        self.ended = False
        self.closed = False

    def abort(self, error: MeshError) -> None:
        """Ends the stream with this error, after the output that is there already."""
        self._mailbox.close(error)

    async def mails(self, deadline: float | None) -> AsyncIterator[Mail]:
        """The output as it comes; the last mail has the outcome.

        Args:
            deadline: the event loop's time at which waiting ends; None for no end.

        Raises:
            MeshError: what ended the request instead; DEADLINE_EXCEEDED at the deadline.
        """
        while not self.ended:
            try:
                async with asyncio.timeout_at(deadline):
                    mail = await self._mailbox.take()
            except TimeoutError:
                raise MeshError(
                    Code.DEADLINE_EXCEEDED,
                    Reason.DEADLINE_EXCEEDED,
                    f"request '{self.request.request_id}' did not end before its deadline",
                ) from None
            self.ended = mail.end is not None
            if isinstance(mail.end, MeshError):
                if mail.token_ids or mail.text:
                    yield Mail(mail.text, mail.token_ids, None)
                raise mail.end
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
    ) -> None:
        self._backend = backend
        self._encoder = encoder
        self._board = board
        self._spans = spans
        self._base_digest = base_digest
        self._open: set[Generation] = set()
        self._numbers = itertools.count(1)

    async def admit(self, request: GenerationRequest, context: Context) -> Generation:
        """Checks the request and hands it to the engine.

        Raises:
            MeshError: INVALID_ARGUMENT, FAILED_PRECONDITION (BASE_MISMATCH), UNAVAILABLE (DRAINING), or what
                the engine refuses it with.
        """
        self._refuse_if_draining()
        _check(request)
        if request.base_digest != self._base_digest:
            raise base_differs(request.base_digest, self._base_digest)
        prompt_ids = await self._encoder.encode(request.prompt)
        # The worker may have begun to drain while the prompt was encoded.
        self._refuse_if_draining()
        mailbox = Mailbox()
        # One id may come twice: in parallel calls of one caller, or in a retry that overtakes a cancel.
        backend_id = f"{request.request_id}#{next(self._numbers)}"
        served = ServedRequest(
            tenant=request.tenant,
            adapter_digest=request.adapter_digest,
            adapter_version=request.adapter_version,
            context=context,
        )
        admission = self._backend.submit(
            Request(
                request_id=backend_id,
                tenant=request.tenant,
                digest=request.adapter_digest or None,
                prompt_ids=prompt_ids,
                sampling=request.sampling,
                context=context,
            ),
            mailbox,
        )
        self._spans.admitted(served, admission.tier)
        generation = Generation(request, backend_id, served, admission, mailbox)
        self._open.add(generation)
        self._board.admitted(request.request_id)
        return generation

    def close(self, generation: Generation) -> None:
        """Forgets a request; what has not ended yet is cancelled in the engine. Any number of times."""
        if generation.closed:
            return
        generation.closed = True
        self._open.discard(generation)
        if not generation.ended:
            self._backend.cancel(generation.backend_id)
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
            self._backend.cancel(generation.backend_id)
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


def _check(request: GenerationRequest) -> None:
    if not request.request_id:
        raise invalid_field("request_id", "is empty")
    if not request.tenant:
        raise invalid_field("tenant", "is empty")
    if request.adapter_digest and not is_digest(request.adapter_digest):
        raise invalid_field("adapter_digest", f"{request.adapter_digest[:80]!r} is not a digest")
    request.sampling.check()
