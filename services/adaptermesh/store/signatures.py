"""Signatures of versions, by keys that the version's namespace trusts."""

import dataclasses
import logging
from dataclasses import dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from adaptermesh.artifact.signing import is_signature
from adaptermesh.core.clock import Clock
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.database import Database
from adaptermesh.store.feed import append_change, feed_head
from adaptermesh.store.fields import MAX_ACTOR, check_text
from adaptermesh.store.policies import unknown_key
from adaptermesh.store.records import ChangeKind, PolicyRecord, Signature, VersionRecord
from adaptermesh.store.resolution import get_digest
from adaptermesh.store.schema import version_signatures, versions
from adaptermesh.store.usability import find_policy

log = logging.getLogger(__name__)

MAX_SIGNATURES = 16
"""Of one version: all of them travel with it."""


@dataclass(frozen=True, slots=True)
class Signed:
    """The outcome of adding a signature; `feed_position` is one that shows it."""

    version: VersionRecord
    created: bool
    feed_position: int


class Signatures:
    """Who has signed which version."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def add(self, digest: str, key_id: str, signature: bytes, actor: str = "") -> Signed:
        """Adds a signature that is good; the same key again changes nothing.

        Raises:
            MeshError: VERSION_NOT_FOUND; SIGNING_KEY_NOT_FOUND if the namespace does not trust the key;
                SIGNATURE_INVALID; FAILED_PRECONDITION for one too many.
        """
        check_text("actor", actor, MAX_ACTOR)
        now_us = int(self._clock.wall() * 1e6)

        async def work(connection: AsyncConnection) -> Signed:
            version = (await get_digest(connection, digest)).record
            _check(version, await find_policy(connection, version.namespace), key_id, signature)
            if any(known.key_id == key_id for known in version.signatures):
                return Signed(version, created=False, feed_position=(await feed_head(connection))[1])
            if len(version.signatures) >= MAX_SIGNATURES:
                raise _too_many(version)
            added = Signature(key_id, signature.hex(), now_us, actor)
            entries = tuple(sorted((*version.signatures, added), key=lambda one: one.key_id))
            await _save(connection, version, entries)
            changed = dataclasses.replace(version, signatures=entries)
            position = await append_change(connection, ChangeKind.VERSION_SIGNED, changed, now_us)
            return Signed(changed, created=True, feed_position=position)

        signed = await self._database.write(work)
        if signed.created:
            log.info(
                "version signed",
                extra={
                    "version": signed.version.ref,
                    "digest": digest,
                    "key_id": key_id,
                    "feed_position": signed.feed_position,
                },
            )
        return signed

    async def list(self, digest: str) -> list[tuple[Signature, bool]]:
        """A version's signatures, and of each whether its key is trusted now; raises as `get_digest`."""
        async with self._database.reading() as connection:
            version = (await get_digest(connection, digest)).record
            policy = await find_policy(connection, version.namespace)
        return [(one, policy.key(one.key_id) is not None) for one in version.signatures]


async def _save(connection: AsyncConnection, version: VersionRecord, entries: tuple[Signature, ...]) -> None:
    query = select(versions.c.id).where(versions.c.digest == version.digest)
    version_id = (await connection.execute(query)).scalar_one()
    values = [dataclasses.asdict(entry) for entry in entries]
    if version.signatures:
        same = version_signatures.c.version_id == version_id
        await connection.execute(update(version_signatures).where(same).values(entries=values))
    else:
        await connection.execute(insert(version_signatures).values(version_id=version_id, entries=values))


def _check(version: VersionRecord, policy: PolicyRecord, key_id: str, signature: bytes) -> None:
    key = policy.key(key_id)
    if key is None:
        raise unknown_key(policy.namespace, key_id)
    if not is_signature(bytes.fromhex(key.public_key), signature, version.digest):
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.SIGNATURE_INVALID,
            f"it is no signature of {version.ref} ({version.digest}) by key '{key_id}'",
            metadata={"name": version.ref, "digest": version.digest, "key_id": key_id},
        )


def _too_many(version: VersionRecord) -> MeshError:
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.INVALID_FIELD,
        f"signature: {version.ref} has {MAX_SIGNATURES} signatures, the limit",
        metadata={"field": "signature"},
    )
