"""Errors that cross a service boundary: a code, one stable reason, and what it is about.

`adaptermesh.rpc.status` turns a `MeshError` into a gRPC status with one `ErrorInfo` and back.
"""

import enum
from collections.abc import Mapping

ERROR_DOMAIN = "adaptermesh"


class Code(enum.IntEnum):
    """The gRPC status codes that the mesh uses, with their numbers on the wire."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """The one catalogue of reasons. A client may switch on these; their meaning never changes."""

    # What was named does not exist.
    TASK_NOT_FOUND = "TASK_NOT_FOUND"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    VERSION_NOT_FOUND = "VERSION_NOT_FOUND"
    VERSION_DELETED = "VERSION_DELETED"
    ALIAS_NOT_FOUND = "ALIAS_NOT_FOUND"
    BASE_NOT_FOUND = "BASE_NOT_FOUND"
    FILE_NOT_FOUND = "FILE_NOT_FOUND"
    SIGNING_KEY_NOT_FOUND = "SIGNING_KEY_NOT_FOUND"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    UPLOAD_NOT_FOUND = "UPLOAD_NOT_FOUND"
    TENANT_NOT_FOUND = "TENANT_NOT_FOUND"
    NAMESPACE_NOT_FOUND = "NAMESPACE_NOT_FOUND"
    KEY_NOT_FOUND = "KEY_NOT_FOUND"
    GRANT_NOT_FOUND = "GRANT_NOT_FOUND"
    # Who asks may not.
    KEY_INVALID = "KEY_INVALID"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    # What was sent is wrong.
    INVALID_NAME = "INVALID_NAME"
    INVALID_REF = "INVALID_REF"
    INVALID_FIELD = "INVALID_FIELD"
    INVALID_UPLOAD = "INVALID_UPLOAD"
    SIGNATURE_INVALID = "SIGNATURE_INVALID"
    ADAPTER_REJECTED = "ADAPTER_REJECTED"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    # The world is not as the request assumes.
    BASE_MISMATCH = "BASE_MISMATCH"
    ADAPTER_UNSUPPORTED = "ADAPTER_UNSUPPORTED"
    ADAPTER_IN_USE = "ADAPTER_IN_USE"
    ALIAS_CONFLICT = "ALIAS_CONFLICT"
    ALIAS_NO_PREVIOUS = "ALIAS_NO_PREVIOUS"
    ALIAS_PROTECTED = "ALIAS_PROTECTED"
    ALIAS_IN_USE = "ALIAS_IN_USE"
    ROUTE_CONFLICT = "ROUTE_CONFLICT"
    STATUS_CONFLICT = "STATUS_CONFLICT"
    VERSION_REVOKED = "VERSION_REVOKED"
    VERSION_UNSIGNED = "VERSION_UNSIGNED"
    VERSION_IN_USE = "VERSION_IN_USE"
    POLICY_CONFLICT = "POLICY_CONFLICT"
    TENANT_CONFLICT = "TENANT_CONFLICT"
    UPLOAD_CONFLICT = "UPLOAD_CONFLICT"
    UPLOAD_INCOMPLETE = "UPLOAD_INCOMPLETE"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    FEED_POSITION_EXPIRED = "FEED_POSITION_EXPIRED"
    # Try again.
    OVERLOADED = "OVERLOADED"
    NO_WORKER = "NO_WORKER"
    WORKER_LOST = "WORKER_LOST"
    GATEWAY_UNREACHABLE = "GATEWAY_UNREACHABLE"
    STORE_UNREACHABLE = "STORE_UNREACHABLE"
    ROUTER_UNREACHABLE = "ROUTER_UNREACHABLE"
    CATALOGUE_STALE = "CATALOGUE_STALE"
    DRAINING = "DRAINING"
    # The end of a request.
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    # A fault of ours.
    DATA_CORRUPT = "DATA_CORRUPT"
    INTERNAL = "INTERNAL"


class MeshError(Exception):
    """An error with a code and a reason, raised where the reason is known.

    `metadata` says what it is about (the ref, the field, both digests, the request id); values are shown to
    the caller, so they hold no secrets. `retry_after` is in seconds; None means that a retry won't help.
    """

    def __init__(
        self,
        code: Code,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"MeshError({self.code.name}, {self.reason.value}, {self.message!r}, {self.metadata!r})"


def not_found(reason: Reason, what: str, name: str) -> MeshError:
    """`<what> '<name>' does not exist`, with the name in the metadata."""
    return MeshError(Code.NOT_FOUND, reason, f"{what} '{name}' does not exist", metadata={"name": name})


def invalid_field(field: str, message: str) -> MeshError:
    """A request field that is out of its range; the field's name is in the metadata."""
    return MeshError(
        Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, f"{field}: {message}", metadata={"field": field}
    )


def unavailable(reason: Reason, message: str, retry_after: float, **metadata: str) -> MeshError:
    """A transient refusal with a delay in seconds after which a retry makes sense."""
    return MeshError(Code.UNAVAILABLE, reason, message, metadata=metadata, retry_after=retry_after)


def base_mismatch(adapter_ref: str, adapter_base: str, requested_base: str) -> MeshError:
    """An adapter was asked for on another base than the one it was trained on; both digests are named."""
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.BASE_MISMATCH,
        f"adapter '{adapter_ref}' was trained on base {adapter_base}, not on {requested_base}",
        metadata={"ref": adapter_ref, "adapter_base_digest": adapter_base, "base_digest": requested_base},
    )


def version_revoked(ref: str, version: str, digest: str, why: str) -> MeshError:
    """A version that must not be used was asked for; `why` is what whoever revoked it said."""
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.VERSION_REVOKED,
        f"'{ref}' means {version}, which is revoked: {why}",
        metadata={"ref": ref, "version": version, "digest": digest, "why": why},
    )


def version_unsigned(ref: str, version: str, digest: str, namespace: str) -> MeshError:
    """A version was asked for that lacks the signature which its namespace asks for."""
    return MeshError(
        Code.FAILED_PRECONDITION,
        Reason.VERSION_UNSIGNED,
        f"'{ref}' means {version}, which no key is known to have signed that namespace '{namespace}' trusts",
        metadata={"ref": ref, "version": version, "digest": digest, "namespace": namespace},
    )


def version_deleted(ref: str, version: str, digest: str, *, time: str, actor: str, why: str) -> MeshError:
    """A version that was removed was asked for; `time` is RFC 3339, `why` what whoever removed it said."""
    by = f" by {actor}" if actor else ""
    because = f": {why}" if why else ""
    return MeshError(
        Code.NOT_FOUND,
        Reason.VERSION_DELETED,
        f"'{ref}' means {version}, which was removed at {time}{by}{because}",
        metadata={
            "ref": ref,
            "version": version,
            "digest": digest,
            "delete_time": time,
            "actor": actor,
            "why": why,
        },
    )
