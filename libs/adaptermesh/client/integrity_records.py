"""Signatures, trusted keys, and what was read again or collected: plain frozen records, no protobuf."""

import datetime
from dataclasses import dataclass

from adaptermesh.client.records import Version
from adaptermesh.core.signature_policy import SignaturePolicy


@dataclass(frozen=True, slots=True)
class BlobCheck:
    """What became of some stored bytes; `problem` is empty if they are what was put."""

    digest: str
    size_bytes: int
    problem: str
    name: str = ""
    """What they are to the version, e.g. a file's path; "" if no version was asked for."""


@dataclass(frozen=True, slots=True)
class Verification:
    """A version's bytes as they arrived here, and as the store read them again."""

    version: Version
    downloaded: tuple[BlobCheck, ...]
    stored: tuple[BlobCheck, ...]

    @property
    def problems(self) -> tuple[BlobCheck, ...]:
        """Those that are not what was put; empty for a version that is whole."""
        return tuple(check for check in (*self.downloaded, *self.stored) if check.problem)


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What a garbage collection removed, or, in a dry run, would have."""

    dry_run: bool
    removed_blobs: int
    removed_bytes: int
    needed_blobs: int
    young_blobs: int
    """No version needs them, but they are younger than the grace."""
    unfinished_uploads: int
    expired_uploads: int = 0


@dataclass(frozen=True, slots=True)
class Signature:
    """A key's signature of a version's digest; it counts while the namespace trusts the key."""

    key_id: str
    signature: str
    actor: str
    create_time: datetime.datetime
    trusted: bool


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key, in hexadecimal, whose signatures a namespace trusts."""

    key_id: str
    public_key: str
    comment: str
    actor: str
    create_time: datetime.datetime


@dataclass(frozen=True, slots=True)
class NamespacePolicy:
    """What must hold in a namespace; `generation` is 0 and `update_time` None if nothing was ever said."""

    namespace: str
    signatures: SignaturePolicy
    keys: tuple[SigningKey, ...]
    generation: int
    update_time: datetime.datetime | None
    actor: str
    tenant_keys: tuple[SigningKey, ...] = ()
    """Those of its tenant, which count, too."""


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A policy after a change; give `feed_position` to a request that must see it."""

    policy: NamespacePolicy
    feed_position: int


@dataclass(frozen=True, slots=True)
class Signed:
    """A version that a key has signed; `created` is False if it had before."""

    version: Version
    key_id: str
    created: bool
    feed_position: int
