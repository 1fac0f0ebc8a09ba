"""Who calls: the store says whom an API key stands for, and is asked again every second or so."""

import asyncio
import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio

from adaptermesh.api.access.v1 import access_pb2, access_pb2_grpc
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.core.rates import Rates
from adaptermesh.gateway.request import Identity
from adaptermesh.rpc import metadata as names
from adaptermesh.rpc.status import mesh_error_from

log = logging.getLogger(__name__)

_REMEMBERED = 4096
_MAX_KEY = 512


@dataclass(frozen=True, slots=True)
class AuthenticationConfig:
    """How callers are recognised."""

    required: bool = False
    cache_seconds: float = 1.0
    """How long a key counts without asking the store again."""
    grace_seconds: float = 60.0
    """How long it does while the store can't be asked."""
    timeout_seconds: float = 10.0


class Authentication:
    """Asks the store whom keys stand for. Of a key itself only a hash is kept."""

    def __init__(self, config: AuthenticationConfig, channel: grpc.aio.Channel, clock: Clock) -> None:
        self._config = config
        self._stub: access_pb2_grpc.AccessServiceAsyncStub = access_pb2_grpc.AccessServiceStub(channel)
        self._clock = clock
        self._rates = Rates(clock)
        self._known: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()
        """Whom a key stands for, and when the store said so."""
        self._asking: dict[bytes, asyncio.Task[Identity]] = {}

    async def identity(self, metadata: Mapping[str, str]) -> Identity | None:
        """Whom a request is from; None where nobody is asked.

        Raises:
            MeshError: UNAUTHENTICATED (KEY_INVALID); QUOTA_EXCEEDED; UNAVAILABLE if the store can't be asked.
        """
        if not self._config.required:
            return None
        authorization = metadata.get(names.AUTHORIZATION, "")
        if not authorization:
            raise _invalid("this gateway wants an API key: 'authorization: Bearer <key>'")
        if len(authorization) > _MAX_KEY:
            raise _invalid("'authorization' must be 'Bearer <key>'")
        found = await self._find(authorization)
        if self._clock.wall() >= found.expire_time:
            raise _invalid("the API key has expired")
        self._rates.take(found.tenant, found.max_requests_per_minute)
        return found

    async def _find(self, authorization: str) -> Identity:
        mark = hashlib.sha256(authorization.encode()).digest()
        known = self._known.get(mark)
        if known is not None and self._clock.monotonic() - known[1] < self._config.cache_seconds:
            self._known.move_to_end(mark)
            return known[0]
        task = self._asking.get(mark)
        if task is None:
            # One question for all requests that wait for its answer.
            task = asyncio.create_task(self._ask(authorization, mark))
            self._asking[mark] = task
            task.add_done_callback(lambda _: self._asking.pop(mark, None))
        try:
            return await asyncio.shield(task)
        except MeshError as error:
            away = error.reason is Reason.STORE_UNREACHABLE
            if away and known is not None and self._is_within_grace(known[1]):
                log.warning("key not checked again", extra={"reason": error.message})
                return known[0]
            raise

    async def _ask(self, authorization: str, mark: bytes) -> Identity:
        try:
            response = await self._stub.GetCaller(
                access_pb2.GetCallerRequest(),
                timeout=self._config.timeout_seconds,
                metadata=((names.AUTHORIZATION, authorization),),
            )
        except grpc.aio.AioRpcError as error:
            raise self._refusal(mesh_error_from(error, Reason.STORE_UNREACHABLE), mark) from error
        if not response.key_id:
            # Any key would be an operator's.
            raise unavailable(
                Reason.STORE_UNREACHABLE, "the gateway asks for API keys, but its store knows none", 10.0
            )
        found = Identity(
            response.tenant,
            tuple(response.namespaces),
            response.max_requests_per_minute,
            response.expire_time.ToMicroseconds() / 1e6 if response.HasField("expire_time") else math.inf,
        )
        self._known[mark] = (found, self._clock.monotonic())
        self._known.move_to_end(mark)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found

    def _refusal(self, error: MeshError, mark: bytes) -> MeshError:
        if error.code is Code.UNAUTHENTICATED:
            self._known.pop(mark, None)
            return _invalid(error.message)
        if error.code is Code.DEADLINE_EXCEEDED:
            return unavailable(Reason.STORE_UNREACHABLE, "the adapter store does not answer", 1.0)
        return error

    def _is_within_grace(self, asked_at: float) -> bool:
        return self._clock.monotonic() - asked_at < self._config.grace_seconds


def _invalid(message: str) -> MeshError:
    return MeshError(Code.UNAUTHENTICATED, Reason.KEY_INVALID, message)
