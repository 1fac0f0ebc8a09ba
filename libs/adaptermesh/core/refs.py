"""Names and refs: how a client spells an adapter, a version, an alias or a digest."""

import re
from dataclasses import dataclass

from adaptermesh.core.digests import is_digest
from adaptermesh.core.errors import Code, MeshError, Reason

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")

BASE = "base"
"""The ref that asks for the bare base model."""

LATEST = "latest"
"""The alias that a ref without a version or an alias stands for; it points where somebody set it."""


def check_name(name: str, what: str) -> str:
    """Returns the name if it is a legal one.

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_NAME).
    """
    if _NAME.fullmatch(name) is None:
        raise MeshError(
            Code.INVALID_ARGUMENT,
            Reason.INVALID_NAME,
            f"{what} {name[:80]!r} is not a legal name: lower-case letters, digits and hyphens, at most 63, "
            "not starting with a hyphen",
            metadata={"field": what, "name": name[:80]},
        )
    return name


@dataclass(frozen=True, slots=True)
class AdapterName:
    """`namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @classmethod
    def checked(cls, namespace: str, name: str) -> "AdapterName":
        """Of two names that may be none; raises MeshError INVALID_ARGUMENT (INVALID_NAME)."""
        return cls(check_name(namespace, "namespace"), check_name(name, "name"))

    @classmethod
    def parse(cls, text: str) -> "AdapterName":
        """Parses `namespace/name`; raises MeshError INVALID_ARGUMENT."""
        namespace, slash, name = text.partition("/")
        if not slash:
            raise _bad_ref(text)
        return cls.checked(namespace, name)


@dataclass(frozen=True, slots=True)
class Ref:
    """A ref: exactly one of `version`, `alias` and `digest` is set."""

    adapter: AdapterName
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.adapter}:v{self.version}"
        return f"{self.adapter}@{self.digest or self.alias}"


def parse_ref(text: str) -> Ref:
    """Parses `ns/name:v3`, `ns/name@alias`, `ns/name@sha256:...` or `ns/name` (the alias `latest`).

    Raises:
        MeshError: INVALID_ARGUMENT (INVALID_REF or INVALID_NAME).
    """
    if len(text) > 256:
        raise _bad_ref(text)
    head, at, target = text.partition("@")
    if at:
        adapter = AdapterName.parse(head)
        if target.startswith("sha256:"):
            if not is_digest(target):
                raise _bad_ref(text)
            return Ref(adapter, digest=target)
        return Ref(adapter, alias=check_name(target, "alias"))
    head, colon, target = text.partition(":")
    adapter = AdapterName.parse(head)
    if not colon:
        return Ref(adapter, alias=LATEST)
    match = _VERSION.fullmatch(target)
    if match is None:
        raise _bad_ref(text)
    return Ref(adapter, version=int(match.group(1)))


def _bad_ref(text: str) -> MeshError:
    return MeshError(
        Code.INVALID_ARGUMENT,
        Reason.INVALID_REF,
        f"{text[:80]!r} is not a ref: use namespace/name:v3, namespace/name@alias or "
        "namespace/name@sha256:...",
        metadata={"ref": text[:256]},
    )
