"""From a request to a worker that has admitted it."""

import logging
from dataclasses import dataclass

from adaptermesh.api.worker.v1 import worker_pb2
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.gateway.channels import WorkerChannels
from adaptermesh.gateway.deadline import Deadline
from adaptermesh.gateway.dispatch import Decision, Router
from adaptermesh.gateway.forward import WorkerStream
from adaptermesh.gateway.request import GenerateCall

log = logging.getLogger(__name__)

_ANOTHER_MAY_SERVE = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


@dataclass(frozen=True, slots=True)
class Placed:
    """An admitted request. Its stream must be closed."""

    stream: WorkerStream
    started: worker_pb2.GenerateStarted
    attempts: int

    @property
    def decision(self) -> Decision:
        return self.stream.decision


@dataclass(frozen=True, slots=True)
class Placement:
    """Asks the router, then the worker; one that can't take the request is left out of the next question."""

    router: Router
    channels: WorkerChannels
    max_attempts: int
    admission_timeout_seconds: float

    async def place(self, call: GenerateCall, deadline: Deadline) -> Placed:
        """A worker that has admitted the request.

        Raises:
            MeshError: the router's refusal, or the last worker's.
        """
        excluded: list[str] = []
        refusal: MeshError | None = None
        while True:
            decision = await self._decide(call, excluded, refusal, deadline)
            stream = await WorkerStream.open(self.channels, call, decision, deadline)
            try:
                started = await stream.started(deadline, self.admission_timeout_seconds)
                return Placed(stream, started, attempts=len(excluded) + 1)
            except BaseException as error:
                await stream.close()
                if not isinstance(error, MeshError) or error.code not in _ANOTHER_MAY_SERVE:
                    raise
                refusal = error
            log.warning(
                "worker did not admit a request",
                extra={
                    "request_id": call.caller.request_id,
                    "worker_id": decision.worker_id,
                    "reason": refusal.reason.value,
                    "error": refusal.message,
                },
            )
            excluded.append(decision.worker_id)
            if len(excluded) >= self.max_attempts:
                raise refusal

    async def _decide(
        self, call: GenerateCall, excluded: list[str], refusal: MeshError | None, deadline: Deadline
    ) -> Decision:
        try:
            return await self.router.dispatch(call, excluded, deadline)
        except MeshError as error:
            if refusal is not None and error.reason is Reason.NO_WORKER:
                # Why the last worker refused says more than that there is no other one.
                raise refusal from error
            raise
