"""Who calls: the key that came with a call, checked, and how often its tenant may call."""

import asyncio
import hashlib
import hmac
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason, unavailable
from adaptermesh.core.roles import MESH_TENANT, Role
from adaptermesh.rpc import metadata as names
from adaptermesh.store.access.api_keys import ApiKeys, KeptKey
from adaptermesh.store.access.caller import Caller, caller_of
from adaptermesh.store.access.secrets import is_key, is_key_id, key_id_of
from adaptermesh.store.ownership import OwnedWork

log = logging.getLogger(__name__)

_REMEMBERED = 4096
_HASHING = 2
_WAITING = 64
_WAITING_FOR_ONE = 4
_USE_SECONDS = 60.0
_BEARER = "bearer "
MIN_ROOT_KEY = 32


@dataclass(frozen=True, slots=True)
class AuthenticationConfig:
    """Whether keys are asked for."""

    required: bool = False
    root_key: str = field(default="", repr=False)
    """A key of the operator's that is in no database: with it the first ones are made. Empty: none."""


class Authentication:
    """Checks keys. The slow hash is made once for each; whether it is valid is looked up each time."""

    def __init__(self, config: AuthenticationConfig, keys: ApiKeys, clock: Clock) -> None:
        self._config = config
        self._keys = keys
        self._clock = clock
        # What is in memory of a key can't be turned back into it, also not by trying.
        self._pepper = os.urandom(32)
        self._good: OrderedDict[bytes, str] = OrderedDict()
        # Threads of their own: what hashes keeps no file waiting.
        self._hashing = ThreadPoolExecutor(_HASHING, thread_name_prefix="key-hash")
        self._checked: Counter[str] = Counter()
        """Of each key how many are being checked that say they are it."""
        self._noted: dict[str, float] = {}
        self._work = OwnedWork()

    @property
    def required(self) -> bool:
        """Whether a call without a key is refused."""
        return self._config.required

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        """Who sent this metadata.

        Raises:
            MeshError: UNAUTHENTICATED (KEY_INVALID); UNAVAILABLE if too many new keys are being checked.
        """
        key = _key_in(metadata)
        if self._config.root_key and _same(key, self._config.root_key):
            return Caller(key_id="root", tenant=MESH_TENANT, roles=(Role.ADMIN,))
        key_id = key_id_of(key)
        kept = None if key_id is None else await self._keys.find(key_id)
        if kept is None:
            raise _invalid("the API key is none of this store's")
        # First, so that nobody makes us compute for the sake of what has ended.
        self._check_valid(kept)
        if not await self._matches(key, kept):
            raise _invalid("the API key is none of this store's")
        self._note_use(kept.record.key_id)
        return caller_of(kept.record, kept.max_requests_per_minute)

    async def close(self) -> None:
        """Waits for what is being written."""
        await self._work.wait()
        self._hashing.shutdown(wait=False, cancel_futures=True)

    async def _matches(self, key: str, kept: KeptKey) -> bool:
        known = hmac.digest(self._pepper, f"{kept.secret_hash} {key}".encode(), hashlib.sha256)
        if known in self._good:
            self._good.move_to_end(known)
            return True
        key_id = kept.record.key_id
        if len(self._checked) >= _WAITING or self._checked[key_id] >= _WAITING_FOR_ONE:
            # Who guesses at one key does not keep the others from theirs.
            raise unavailable(Reason.OVERLOADED, "too many API keys are being checked", retry_after=1.0)
        self._checked[key_id] += 1
        try:
            loop = asyncio.get_running_loop()
            matches = await loop.run_in_executor(self._hashing, is_key, key, kept.secret_hash)
        finally:
            self._checked -= Counter((key_id,))
        if matches:
            self._good[known] = kept.record.key_id
            while len(self._good) > _REMEMBERED:
                self._good.popitem(last=False)
        return matches

    async def check_again(self, caller: Caller) -> None:
        """For a call that lasts: raises MeshError UNAUTHENTICATED if its key has ended meanwhile."""
        kept = await self._keys.find(caller.key_id) if is_key_id(caller.key_id) else None
        if kept is not None:
            self._check_valid(kept)

    def _check_valid(self, kept: KeptKey) -> None:
        record = kept.record
        if record.revoke_time_us:
            raise _invalid(f"API key {record.key_id} is revoked", key_id=record.key_id)
        if record.expire_time_us and record.expire_time_us <= self._clock.wall() * 1e6:
            raise _invalid(f"API key {record.key_id} has expired", key_id=record.key_id)

    def _note_use(self, key_id: str) -> None:
        """Beside the call: nobody waits for it, and it may be lost."""
        now = self._clock.monotonic()
        if now - self._noted.get(key_id, -_USE_SECONDS) < _USE_SECONDS:
            return
        if len(self._noted) > _REMEMBERED:
            self._noted.clear()
        self._noted[key_id] = now
        self._work.begin(self._keys.note_use(key_id, int(self._clock.wall() * 1e6)))


def _key_in(metadata: Mapping[str, str]) -> str:
    value = metadata.get(names.AUTHORIZATION, "")
    if not value:
        raise _invalid("this store wants an API key: 'authorization: Bearer <key>'")
    if value[: len(_BEARER)].lower() != _BEARER:
        raise _invalid("'authorization' must be 'Bearer <key>'")
    return value[len(_BEARER) :].strip()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _invalid(message: str, **metadata: str) -> MeshError:
    return MeshError(Code.UNAUTHENTICATED, Reason.KEY_INVALID, message, metadata=metadata)
